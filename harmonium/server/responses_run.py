"""Responses while they are made: in front of a client, or in the background until somebody fetches them.

A response that completes is stored before its last event is given out, so that nobody hears of a response
that a crash could still lose.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from harmonium.errors import ApiError, EngineClosed, PromptTooLong, StoreError
from harmonium.server.errors import log_defect
from harmonium.server.responses_elsewhere import Heartbeat
from harmonium.server.responses_events import TERMINAL_TYPES, ResponseEvents
from harmonium.server.responses_input import PreparedResponse
from harmonium.server.state import ServerState
from harmonium.server.store_records import Json, SharedStore, Store
from harmonium.server.store_threads import in_store_thread
from harmonium.server.turns import Turn, open_turn

STORE_SECONDS = 60.0
"""How long the end of a background response waits for a database that is away."""

_log = logging.getLogger("harmonium.server")


class BackgroundRun:
    """A response that is made whether or not somebody listens.

    created: the object before anything was done. events: all so far. failure: why its end is not stored.
    """

    def __init__(self, owner: str, writer: ResponseEvents) -> None:
        self.owner = owner
        self.writer = writer
        self.created = writer.response
        self.events: list[Json] = []
        self.task: asyncio.Task[None] | None = None
        self.is_cancelled = False
        self._news = asyncio.Event()
        self.failure: StoreError | None = None
        self._is_over = False

    @property
    def response(self) -> Json:
        """The object as it stands, with the items that are whole."""
        return self.writer.response

    def add(self, event: Json) -> None:
        """One more event, for all who listen."""
        self.events.append(event)
        self._wake()

    def end(self, failure: StoreError | None = None) -> None:
        """No more events will come. failure: why the last one could not be stored, and is not given out."""
        self.failure = failure
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self, after: int) -> AsyncGenerator[Json, None]:
        """Events with a sequence number above `after`, then those that come. Leaving it stops nothing.

        Raises StoreError where the end could not be stored.
        """
        place = max(0, after + 1)
        while True:
            news = self._news
            while place < len(self.events):
                yield self.events[place]
                place += 1
            if self._is_over:
                if self.failure is not None:
                    raise self.failure
                return
            await news.wait()


class Responses:
    """All responses of a server: those that run in the background, and the store of those that ended."""

    def __init__(self, state: ServerState, store: Store) -> None:
        self.state = state
        self.store = store
        self.shared = store if isinstance(store, SharedStore) else None
        self.running: dict[str, BackgroundRun] = {}
        self._heartbeat = None if self.shared is None else Heartbeat(self.shared, self.running, self.cancel)
        self._is_closing = False

    async def whole(self, prepared: PreparedResponse) -> Json:
        """The response in one piece. Raises what `open` raises, and the engine's error when it fails."""
        turn = await self.open(prepared)
        writer = self._writer(prepared, turn)
        async for _ in self._events(prepared, turn, writer):
            pass
        if writer.failure is not None:
            raise writer.failure
        return writer.response

    async def stream(self, prepared: PreparedResponse, turn: Turn) -> AsyncGenerator[Json, None]:
        """The events of an opened turn. Closing the generator aborts it, and nothing is stored."""
        events = self._events(prepared, turn, self._writer(prepared, turn))
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def open(self, prepared: PreparedResponse) -> Turn:
        """Admit the request. Raises ApiError (400 for a prompt that is too long; 429, 503).

        Raises StoreError before anything is computed whose result could not be kept.
        """
        if self.shared is not None and prepared.facts.request.is_stored:
            await in_store_thread(self.shared.check)
        try:
            return await open_turn(self.state, prepared.chat_request)
        except PromptTooLong as error:
            raise ApiError(str(error), param="input", code=error.code) from None

    async def start(self, prepared: PreparedResponse) -> BackgroundRun:
        """Make the response in the background. It is stored as queued when this returns."""
        turn = await self.open(prepared)
        writer = self._writer(prepared, turn)
        try:
            await in_store_thread(self.store.put, writer.response, prepared.turn, prepared.owner)
        except BaseException:
            await turn.aclose()
            raise
        run = BackgroundRun(prepared.owner, writer)
        self.running[writer.response["id"]] = run
        run.task = asyncio.create_task(self._make(prepared, turn, run))
        if self._heartbeat is not None:
            self._heartbeat.start()
        await asyncio.sleep(0)  # a task that is cancelled before its first step would never clean up
        return run

    def find_running(self, response_id: str, owner: str) -> BackgroundRun | None:
        """The run of this response, if it runs and is this owner's."""
        run = self.running.get(response_id)
        return run if run is not None and run.owner == owner else None

    async def cancel(self, run: BackgroundRun) -> Json:
        """End a run. Returns its response, which is cancelled unless it came to its own end first.

        Raises StoreError where that could not be stored.
        """
        run.is_cancelled = True
        await self._stop(run)
        if run.failure is not None:
            raise run.failure
        return run.response

    async def close(self) -> None:
        """End what runs in the background, as when the server stops, and close the store."""
        self._is_closing = True
        for run in list(self.running.values()):
            await self._stop(run)
        if self._heartbeat is not None:
            await self._heartbeat.close()
        self.store.close()

    async def _stop(self, run: BackgroundRun) -> None:
        assert run.task is not None, "a run that can be found was started"
        if not run.writer.is_over:
            run.task.cancel()
        await asyncio.wait({run.task})

    def _writer(self, prepared: PreparedResponse, turn: Turn) -> ResponseEvents:
        facts = replace(prepared.facts, warnings=(*prepared.facts.warnings, *turn.started.warnings))
        return ResponseEvents(facts, self.store.seal, time.time)

    async def _events(
        self, prepared: PreparedResponse, turn: Turn, writer: ResponseEvents, run: BackgroundRun | None = None
    ) -> AsyncGenerator[Json, None]:
        async with turn:
            for event in writer.begin():
                yield event
            async for chat_event in turn:
                for event in writer.push(chat_event):
                    if event["type"] in TERMINAL_TYPES and prepared.facts.request.is_stored:
                        await self._save(prepared, writer, [*run.events, event] if run is not None else None)
                    yield event

    async def _save(
        self, prepared: PreparedResponse, writer: ResponseEvents, events: list[Json] | None
    ) -> None:
        whole = replace(prepared.turn, entries=(*prepared.turn.entries, *writer.entries))
        if events is None:
            await in_store_thread(self.store.put, writer.response, whole, prepared.owner)
        else:
            await self._patiently(self.store.end, writer.response, whole, events)

    async def _patiently(self, work: Callable[..., object], *arguments: object) -> None:
        """A database that is away for a moment must not cost an answer that took minutes."""
        end = time.monotonic() + STORE_SECONDS
        while True:
            try:
                await in_store_thread(work, *arguments)
                return
            except StoreError:
                if self._is_closing or time.monotonic() > end:
                    raise
            await asyncio.sleep(1.0)

    async def _make(self, prepared: PreparedResponse, turn: Turn, run: BackgroundRun) -> None:
        """The task of a run."""
        failure: StoreError | None = None
        try:
            await self._work(prepared, turn, run)
        except StoreError as error:
            failure = error
            _log.error("background response %s is lost: %s", prepared.facts.response_id, error)
        finally:
            await turn.aclose()
            self.running.pop(prepared.facts.response_id, None)
            run.end(failure)

    async def _work(self, prepared: PreparedResponse, turn: Turn, run: BackgroundRun) -> None:
        """The events of a run into the run, its end into the store. Raises StoreError."""
        try:
            async for event in self._events(prepared, turn, run.writer, run):
                run.add(event)
        except StoreError:
            raise
        except asyncio.CancelledError:
            reason = EngineClosed("the server was shut down before the answer was whole")
            await self._end(prepared, run, None if run.is_cancelled else reason)
        except Exception as error:
            log_defect(error, f"background response {prepared.facts.response_id}")
            await self._end(prepared, run, error)

    async def _end(self, prepared: PreparedResponse, run: BackgroundRun, error: Exception | None) -> None:
        """A run that did not come to its own end: cancelled, or failed."""
        writer = run.writer
        last = list(writer.cancel() if error is None else writer.fail(error))
        try:
            await self._save(prepared, writer, [*run.events, *last])
        finally:
            for event in last:
                run.add(event)
