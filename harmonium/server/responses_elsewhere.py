"""Background responses and the other servers that share the store: theirs from here, ours for them.

A server that makes a response tells the store of it every `BEAT_SECONDS`, with the events since the last
time; the others read there how it stands, and leave word that it shall be cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

from harmonium.errors import ApiError, StoreError
from harmonium.server.errors import log_defect
from harmonium.server.store_records import RUNNING, Json, Progress, SharedStore
from harmonium.server.store_threads import in_store_thread

BEAT_SECONDS = 0.5
LOOK_SECONDS = 0.25
CANCEL_SECONDS = 5.0

_log = logging.getLogger("harmonium.server")


class RunningResponse(Protocol):
    """A response that is made here. events: all so far."""

    events: list[Json]

    @property
    def response(self) -> Json:
        """The object as it stands."""
        ...


class Heartbeat:
    """Tells the store of the responses that are made here, as long as there are any.

    running: by id; whoever owns it adds and removes. stop: called for one that shall not run any more.
    """

    def __init__(
        self,
        store: SharedStore,
        running: dict[str, Any],
        stop: Callable[[Any], Awaitable[object]],
    ) -> None:
        self._store = store
        self._running: dict[str, RunningResponse] = running
        self._stop = stop
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """There is a response to tell of."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Tell no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        is_away = False
        while self._running:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                await self.beat()
                is_away = False
            except StoreError as error:
                if not is_away:
                    _log.warning("background responses go on untold of: %s", error)
                is_away = True
            except Exception as error:
                # Without a next beat others would take all our responses for lost.
                log_defect(error, "a heartbeat")

    async def beat(self) -> None:
        """Tell once. Raises StoreError."""
        unwanted = await in_store_thread(
            self._store.beat, {id_: _progress(run) for id_, run in self._running.items()}
        )
        for run in [self._running[id_] for id_ in unwanted if id_ in self._running]:
            await self._stop(run)


def _progress(run: RunningResponse) -> Progress:
    return Progress(run.response if run.response["status"] in RUNNING else None, tuple(run.events))


async def follow_elsewhere(
    store: SharedStore, response_id: str, owner: str, after: int
) -> AsyncGenerator[Json, None]:
    """The events above `after` of a response that another server makes, as it tells of them, to the last.

    Raises StoreError, and ApiError (404) when the response is deleted.
    """
    while True:
        # In this order: what was ended in between has all its events, the last one among them.
        body = await in_store_thread(store.body, response_id, owner)
        for event in await in_store_thread(store.events, response_id, owner, after) or ():
            yield event
            after = event["sequence_number"]
        if body is None:
            raise ApiError(
                f"response {response_id[:100]!r} was deleted", status=404, code="response_not_found"
            )
        if body["status"] not in RUNNING:
            return
        await asyncio.sleep(LOOK_SECONDS)


async def cancel_elsewhere(store: SharedStore, response_id: str, owner: str) -> Json | None:
    """Have a response cancelled by the server that makes it; None if it is not stored. Raises StoreError.

    The object as that server left it, with what was whole of its output. One that does not answer within
    `CANCEL_SECONDS` is not waited for: the response is cancelled as the store has it.
    """
    await in_store_thread(store.request_cancel, response_id, owner)
    end = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < end:
        body = await in_store_thread(store.body, response_id, owner)
        if body is None or body["status"] not in RUNNING:
            return body
        await asyncio.sleep(LOOK_SECONDS)
    return await in_store_thread(store.cancel, response_id, owner)
