"""A prompt of token ids continued for an HTTP request: a slot is held, tokens and time are counted."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from harmonium.engine.protocol import Engine, PromptScorer, Request, Token, TokenEvent
from harmonium.errors import ApiError, EngineError
from harmonium.server.state import ServerState


class RawTurn:
    """One admitted continuation; read its `events` once, then close it. Closing it early aborts it.

    wants_answer: False only scores the prompt. num_prompt_top: log-probabilities of the prompt's tokens with
    so many alternatives, None: none.
    """

    def __init__(
        self, state: ServerState, request: Request, wants_answer: bool, num_prompt_top: int | None
    ) -> None:
        self.request = request
        self.wants_answer = wants_answer
        self._num_prompt_top = num_prompt_top
        self.num_cached = 0
        self._state = state
        self._slot = ExitStack()
        self._engine: Engine = state.engine
        self._events: AsyncGenerator[TokenEvent, None] | None = None
        self._num_tokens = 0
        self._began = time.monotonic()
        self._reason = "abort"

    def open(self) -> None:
        """Take a slot, be admitted. Raises ApiError and what `Engine.admit` raises."""
        with ExitStack() as stack:
            stack.enter_context(self._state.hold(self.request.adapter))
            if self._state.tracing is not None:
                traced = self._state.tracing.turn(self._engine, "text_completion", self.request.sampling)
                self._engine = stack.enter_context(traced)
            self._engine.admit(self.request)
            stack.callback(self._count)
            self._slot = stack.pop_all()

    async def prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt's tokens, with log-probabilities where they were asked for. Raises ApiError."""
        if self._num_prompt_top is None:
            return tuple(Token(token_id) for token_id in self.request.token_ids)
        engine = self._state.loaded_engine
        if not isinstance(engine, PromptScorer):
            raise ApiError(
                "echo with logprobs is not supported by this engine",
                param="echo",
                code="unsupported_parameter",
            )
        return await engine.score(self.request.token_ids, self._num_prompt_top, self.request.adapter)

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """The answer's events. Raises EngineError, ApiError when it fails on the way."""
        if not self.wants_answer:
            self._reason = "length"
            yield TokenEvent((), "length")
            return
        self._events = self._engine.generate(self.request)
        async with aclosing(self._events) as events:
            async for event in events:
                self._see(event)
                yield event

    def _see(self, event: TokenEvent) -> None:
        if self._num_tokens == 0 and event.tokens:
            self._state.metrics.first_token.observe(time.monotonic() - self._began)
        self._num_tokens += len(event.tokens)
        self.num_cached = max(self.num_cached, event.num_cached_tokens)
        self._reason = event.finish_reason or self._reason
        if event.finish_reason == "error":
            raise EngineError(event.error or "the engine failed")
        if event.finish_reason == "aborted":
            raise ApiError(
                "the answer was cut off: the server is shutting down", status=503, code="server_draining"
            )

    def _count(self) -> None:
        metrics = self._state.metrics
        metrics.finished.labels(self._reason).inc()
        metrics.prompt_tokens.inc(len(self.request.token_ids))
        metrics.generation_tokens.inc(self._num_tokens)
        metrics.queried_tokens.inc(len(self.request.token_ids))
        metrics.cached_tokens.inc(self.num_cached)
        metrics.answer_seconds.observe(time.monotonic() - self._began)

    def give_back(self) -> None:
        """Give the slot back, where no event was asked for. A second call does nothing."""
        self._slot.close()

    async def aclose(self) -> None:
        """Abort what still runs and give the slot back; nobody may be waiting for an event."""
        if self._events is not None:
            await self._events.aclose()
        self.give_back()
