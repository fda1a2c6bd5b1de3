"""A turn of the model on behalf of an HTTP request: a slot is held, times and tokens are counted.

async with await open_turn(state, chat_request) as turn:    # raises while a status can still be sent
    async for event in turn: ...                            # leaving the block aborts the turn
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from types import TracebackType

from harmonium.chat import ChatRequest, stream_chat
from harmonium.chat_events import (
    ChatEvent,
    ChatResult,
    ContentDelta,
    Finish,
    ReasoningDelta,
    ResultBuilder,
    ToolArgumentsDelta,
    TurnStarted,
)
from harmonium.errors import ApiError, EngineError
from harmonium.server.state import ServerState


class Turn:
    """One admitted turn; iterate it once, then close it. Closing it early aborts it.

    started: its first event, read already and given again by iterating.
    """

    def __init__(self, state: ServerState, request: ChatRequest) -> None:
        self.request = request
        self._state = state
        self._stack = AsyncExitStack()
        self._meter = _Meter(state)
        self.started: TurnStarted

    async def open(self) -> None:
        """Take a slot, render, be admitted. Raises ApiError and what `stream_chat` raises."""
        async with AsyncExitStack() as stack:
            stack.enter_context(self._state.hold(self.request.adapter))
            engine, trace = self._state.engine, self._state.tracing
            if trace is not None:
                engine = stack.enter_context(trace.turn(engine, "chat", self.request.sampling))
            self._events: AsyncGenerator[ChatEvent, None] = stream_chat(engine, self.request)
            stack.push_async_callback(self._events.aclose)
            first = await anext(self._events)
            assert isinstance(first, TurnStarted)
            self.started = first
            stack.callback(self._meter.close)
            self._stack = stack.pop_all()

    def __aiter__(self) -> AsyncGenerator[ChatEvent, None]:
        return self._iterate()

    async def _iterate(self) -> AsyncGenerator[ChatEvent, None]:
        yield self.started
        async for event in self._events:
            self._meter.push(event)
            yield event

    async def result(self) -> ChatResult:
        """The whole turn. Raises ApiError or EngineError when it failed: see `check_finish`."""
        builder = ResultBuilder()
        async for event in self:
            builder.push(event)
            if isinstance(event, Finish):
                check_finish(event)
        return builder.result()

    async def aclose(self) -> None:
        """Give the slot back; abort what still runs. A second call does nothing."""
        await self._stack.aclose()

    async def __aenter__(self) -> Turn:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def open_turn(state: ServerState, request: ChatRequest) -> Turn:
    """A turn that was admitted; close it. Raises ApiError (429, 503, ...) and what `stream_chat` raises."""
    turn = Turn(state, request)
    await turn.open()
    return turn


async def open_turns(state: ServerState, requests: list[ChatRequest]) -> list[Turn]:
    """All of them or none."""
    turns: list[Turn] = []
    try:
        for request in requests:
            turns.append(await open_turn(state, request))  # noqa: PERF401  # those opened are closed below
    except BaseException:
        await close_turns(turns)
        raise
    return turns


async def close_turns(turns: list[Turn]) -> None:
    """Close them all, whatever one of them raises."""
    await asyncio.gather(*(turn.aclose() for turn in turns), return_exceptions=True)


def check_finish(finish: Finish) -> None:
    """Raises what a turn that failed is told with: the engine's error; 503 when the engine was closed."""
    if finish.finish_reason == "error":
        raise finish.error or EngineError("the engine failed")
    if finish.finish_reason == "aborted":
        raise ApiError(
            "the answer was cut off: the server is shutting down",
            status=503,
            code="server_draining",
            retry_after_seconds=5,
        )


class _Meter:
    """What the metrics learn of one turn."""

    def __init__(self, state: ServerState) -> None:
        self._metrics = state.metrics
        self._began = time.monotonic()
        self._first: float | None = None
        self._last = self._began
        self._finish: Finish | None = None

    def push(self, event: ChatEvent) -> None:
        if isinstance(event, (ReasoningDelta, ContentDelta, ToolArgumentsDelta)):
            now = time.monotonic()
            if self._first is None:
                self._first = now
                self._metrics.first_token.observe(now - self._began)
            else:
                self._metrics.inter_token.observe(now - self._last)
            self._last = now
        if isinstance(event, Finish):
            self._finish = event

    def close(self) -> None:
        now = time.monotonic()
        finish, metrics = self._finish, self._metrics
        metrics.finished.labels("abort" if finish is None else finish.finish_reason).inc()
        metrics.answer_seconds.observe(now - self._began)
        if finish is None:
            return
        usage = finish.usage
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.generation_tokens.inc(usage.completion_tokens)
        metrics.queried_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        if self._first is not None and usage.completion_tokens > 1:
            metrics.token_seconds.observe((now - self._first) / (usage.completion_tokens - 1))
