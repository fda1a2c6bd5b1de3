"""The answer to one request, made of one or more calls to an upstream.

A constraint is kept from here, so that it needs nothing of the upstream but tokens: what comes is checked
token by token; where a token is not allowed the call is cut, the token is drawn again among those that are
(or put, where there is but one), and another call goes on behind it. Drawing first from all tokens and, if
that fails, from the allowed ones gives each of these p/L, where L is the allowed tokens' share: the same as
drawing among the allowed ones at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import numpy as np
import numpy.typing as npt

from harmonium.engine.constraint import ConstraintState
from harmonium.engine.protocol import FinishReason, Request, Token, TokenEvent
from harmonium.engine.vllm_wire import Call, Chunk, LostError
from harmonium.errors import EngineError, UpstreamError

Stream = Callable[[Call], AsyncGenerator[Chunk, None]]

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}

_MOST_BANNED = 4096
"""Where fewer tokens than this are not allowed, they are named rather than those that are."""

_BAN = -100.0
"""The least that vLLM's logit_bias takes; what is drawn is checked all the same."""

_SEED_STEP = 0x9E3779B9
"""Between the seeds of an answer's calls, which would otherwise repeat the same draws."""


MAX_RESUMED = 1
"""How often an answer whose upstream went away goes on elsewhere. More would let one request that kills its
server kill them all.
"""


class Answer:
    """An answer without a constraint: one call, or two where an upstream went away.

    num_resumed: how often that was.
    """

    def __init__(self, request: Request, room: int, model: str) -> None:
        """room: most tokens of the answer, at least 1."""
        self._request = request
        self._room = room
        self._model = model
        self._token_ids: list[int] = []
        self._num_calls = 0
        self._num_cached = 0
        self.num_resumed = 0

    async def events(self, stream: Stream) -> AsyncGenerator[TokenEvent, None]:
        """The events; closing the generator closes the call."""
        while len(self._token_ids) < self._room:
            try:
                async with aclosing(stream(self._call())) as chunks:
                    async for chunk in chunks:
                        yield self._event(chunk.tokens, self._reason(chunk), chunk)
                return
            except LostError as error:  # noqa: PERF203  # it is raised once in the life of an answer
                self._resume(error)
        yield TokenEvent((), "length", self._num_cached)

    def _resume(self, error: LostError) -> None:
        """Let another call go on. Raises the error when there was one already."""
        if self.num_resumed >= MAX_RESUMED:
            raise error
        self.num_resumed += 1

    def _call(self, max_tokens: int | None = None, mask: npt.NDArray[np.uint32] | None = None) -> Call:
        """A call that goes on behind what is here. mask: the tokens that may come."""
        request = self._request
        self._num_calls += 1
        allowed, bias = (None, {}) if mask is None else _allowed(mask)
        number = "" if self._num_calls == 1 else f"-{self._num_calls}"
        return Call(
            f"{request.request_id}{number}",
            self._model,
            (*request.token_ids, *self._token_ids),
            request.sampling,
            max_tokens or self._room - len(self._token_ids),
            request.stop_token_ids,
            request.cache_salt,
            allowed,
            {**self._penalties(), **bias},
            _SEED_STEP * (self._num_calls - 1),
        )

    def _penalties(self) -> Mapping[int, float]:
        """What the answer's tokens so far cost: to a later call they are a prompt's, which costs nothing."""
        sampling = self._request.sampling
        if not (sampling.presence_penalty or sampling.frequency_penalty):
            return {}
        return {
            token_id: -sampling.presence_penalty - sampling.frequency_penalty * count
            for token_id, count in Counter(self._token_ids).items()
        }

    def _reason(self, chunk: Chunk) -> FinishReason | None:
        if chunk.finish_reason is None:
            return None
        reason = _REASONS.get(chunk.finish_reason)
        if reason is None:
            raise UpstreamError(f"vLLM ended the answer with {chunk.finish_reason[:40]!r}")
        return reason

    def _event(self, tokens: tuple[Token, ...], reason: FinishReason | None, chunk: Chunk) -> TokenEvent:
        self._token_ids += [token.token_id for token in tokens]
        if self._num_calls == 1:  # later calls find the earlier ones' tokens in the cache
            self._num_cached = max(self._num_cached, chunk.num_cached or 0)
        return TokenEvent(tokens, reason, self._num_cached)


class GuidedAnswer(Answer):
    """An answer that keeps to a constraint.

    num_corrections: how often it had to be put right.
    """

    def __init__(self, request: Request, room: int, model: str, max_corrections: int) -> None:
        super().__init__(request, room, model)
        assert request.constraint is not None, "an answer without one is an Answer"
        self._state: ConstraintState = request.constraint.start()
        self._max_corrections = max_corrections
        self.num_corrections = 0

    async def events(self, stream: Stream) -> AsyncGenerator[TokenEvent, None]:
        """The events. One with finish_reason "error" ends an answer that could not be put right."""
        while True:
            illegal: EngineError | None = None
            try:
                async with aclosing(stream(self._call())) as chunks:
                    async for chunk in chunks:
                        tokens, illegal = self._advance(chunk.tokens)
                        reason = self._stop(tokens)
                        if reason is None and illegal is None:
                            reason = self._reason(chunk)
                        if tokens or reason is not None:
                            yield self._event(tokens, reason, chunk)
                        if reason is not None:
                            return
                        if illegal is not None:
                            break
            except LostError as error:
                self._resume(error)
                continue
            assert illegal is not None, "a stream ends with a finish_reason"
            if self.num_corrections >= self._max_corrections:
                yield TokenEvent((), "error", self._num_cached, str(illegal))
                return
            self.num_corrections += 1
            event = await self._correct(stream)
            yield event
            if event.finish_reason is not None:
                return

    def _advance(self, tokens: tuple[Token, ...]) -> tuple[tuple[Token, ...], EngineError | None]:
        """The tokens as far as they are legal, and why the next one is not. None follow a complete answer."""
        for number, token in enumerate(tokens):
            if self._state.is_complete:
                return tokens[:number], None
            try:
                self._state.advance(token.token_id)
            except EngineError as error:
                return tokens[:number], error
        return tokens, None

    def _stop(self, tokens: tuple[Token, ...]) -> FinishReason | None:
        """Why the answer is over behind these tokens. None: it is not."""
        if self._state.is_complete:
            return "stop"
        if tokens and tokens[-1].token_id in self._request.stop_token_ids:
            return "stop"
        return "length" if len(self._token_ids) + len(tokens) >= self._room else None

    async def _correct(self, stream: Stream) -> TokenEvent:
        """Put the tokens that must come, or have one drawn among those that may."""
        room = self._room - len(self._token_ids)
        try:
            forced = self._state.forced_tokens()[:room]
            if forced:
                has_logprobs = self._request.sampling.logprobs is not None
                tokens = tuple(_certain(token_id, has_logprobs) for token_id in forced)
            else:
                tokens = await self._drawn(stream, await asyncio.to_thread(self._state.mask))
        except EngineError as error:  # the grammar itself gave up
            if isinstance(error, UpstreamError) or error.status != EngineError.status:
                raise
            return TokenEvent((), "error", self._num_cached, str(error))
        legal, illegal = self._advance(tokens)
        reason = self._stop(legal)
        if illegal is not None and reason is None:
            return TokenEvent((), "error", self._num_cached, str(illegal))
        return self._event(legal, reason, Chunk())

    async def _drawn(self, stream: Stream, mask: npt.NDArray[np.uint32]) -> tuple[Token, ...]:
        tokens: tuple[Token, ...] = ()
        async with aclosing(stream(self._call(1, mask))) as chunks:
            async for chunk in chunks:
                tokens += chunk.tokens
                self._reason(chunk)
        if not tokens:
            raise UpstreamError("vLLM drew no token")
        return tokens


def _certain(token_id: int, has_logprobs: bool) -> Token:
    """A token that was not drawn; as in our own engine its log-probability is 0."""
    return Token(token_id, 0.0) if has_logprobs else Token(token_id)


def _allowed(mask: npt.NDArray[np.uint32]) -> tuple[tuple[int, ...] | None, dict[int, float]]:
    """(the tokens that may come, no bias) or (None, a bias against the others), whichever is shorter."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    banned = np.flatnonzero(bits == 0)
    if len(banned) <= _MOST_BANNED:
        return None, dict.fromkeys((int(token_id) for token_id in banned), _BAN)
    return tuple(int(token_id) for token_id in np.flatnonzero(bits)), {}
