"""ScriptedEngine: an engine that plays given token ids, for tests and for API checks without weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from harmonium.engine.admission import check_request, refuse_begun_answer
from harmonium.engine.protocol import EngineInfo, FinishReason, Request, Token, TokenEvent
from harmonium.errors import ConfigError, EngineBusy, EngineClosed
from harmonium.model.batch import SamplingParams


@dataclass(frozen=True, slots=True)
class Script:
    """One answer. tokens: ids, or Token where log-probabilities matter.

    error: after the tokens the answer ends with "error" and this text. end: how it ends when the tokens are
    used up and no stop token was among them. obeys_constraint: where the request has a constraint, a token
    that it does not allow ends the answer with "error". tokens_per_event, seconds_per_event: None takes the
    engine's.
    """

    tokens: tuple[int | Token, ...]
    error: str | None = None
    end: Literal["stop", "length"] = "length"
    tokens_per_event: int | None = None
    seconds_per_event: float | None = None
    obeys_constraint: bool = False


ScriptSource = Callable[[Request], "Script | Iterable[int | Token]"]


class ScriptedEngine:
    """Answers the n-th request with the n-th script, and starts again after the last; or asks a function.

    Everything but the choice of tokens is as in a real engine: requests are checked, an answer ends "stop"
    after the first stop token, "length" at max_tokens, at the end of the context or of the script; closing
    the generator aborts. A script's token given as a plain id has log-probability 0: it was certain.
    """

    def __init__(
        self,
        scripts: Iterable[Script | Iterable[int | Token]] | ScriptSource,
        *,
        info: EngineInfo | None = None,
        tokens_per_event: int = 1,
        seconds_per_event: float = 0.0,
        max_running: int | None = None,
        check: Callable[[Request], None] | None = None,
    ) -> None:
        """max_running: requests played at once; one more meets EngineBusy. None: any number. check: called
        by `admit`; raises when a request could not be played.

        Raises ConfigError when there is no script or tokens_per_event is below 1.
        """
        self._source = scripts if callable(scripts) else None
        self._scripts = [] if callable(scripts) else [_script(script) for script in scripts]
        if self._source is None and not self._scripts:
            raise ConfigError("scripts is empty; expected at least one")
        if tokens_per_event < 1:
            raise ConfigError(f"tokens_per_event is {tokens_per_event}; expected at least 1")
        self._info = info or EngineInfo("scripted", 131_072, 201_088, engine="scripted")
        self._tokens_per_event = tokens_per_event
        self._seconds_per_event = seconds_per_event
        self._max_running = max_running
        self._check = check
        self._running = 0
        self._closing = asyncio.Event()
        self.requests: list[Request] = []
        """Every request that was played, in order."""
        self.finished: list[FinishReason] = []
        """How each ended; "aborted" when its generator was closed first."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def running(self) -> int:
        """Requests that are being played now."""
        return self._running

    def admit(self, request: Request) -> None:
        """Raises PromptTooLong, RequestError, EngineBusy, EngineClosed."""
        check_request(request, self._info)
        refuse_begun_answer(request, "a script")
        if self._closing.is_set():
            raise EngineClosed("the engine is closed")
        if self._max_running is not None and self._running >= self._max_running:
            raise EngineBusy(f"{self._running:,} requests run; the limit is {self._max_running:,}")
        if self._check is not None:
            self._check(request)

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Play the request's script. Raises what `admit` raises when the first event is asked for."""
        self.admit(request)
        number = len(self.requests)
        self.requests.append(request)
        script = (
            _script(self._source(request)) if self._source else self._scripts[number % len(self._scripts)]
        )
        script = _checked(script, request)
        tokens, reason = _cut(script, request, self._info.context_length)
        size = script.tokens_per_event or self._tokens_per_event
        pause = self._seconds_per_event if script.seconds_per_event is None else script.seconds_per_event
        self._running += 1
        ended: FinishReason = "aborted"
        try:
            for event in _events(tokens, reason, script.error, size):
                await asyncio.sleep(pause)
                if self._closing.is_set():
                    yield TokenEvent((), "aborted")
                    return
                ended = event.finish_reason or ended
                yield event
        finally:
            self._running -= 1
            self.finished.append(ended)

    async def score(
        self, token_ids: tuple[int, ...], num_top: int, adapter: str | None = None
    ) -> tuple[Token, ...]:
        """As PromptScorer says; every token was certain. Raises PromptTooLong, RequestError, EngineClosed."""
        check_request(Request("score", token_ids, adapter=adapter), self._info)
        if self._closing.is_set():
            raise EngineClosed("the engine is closed")
        first = Token(token_ids[0])
        return (first, *(Token(id_, 0.0, ((id_, 0.0),) if num_top else ()) for id_ in token_ids[1:]))

    async def close(self) -> None:
        """End what is played with "aborted". A second call does nothing."""
        self._closing.set()


def _script(script: Script | Iterable[int | Token]) -> Script:
    return script if isinstance(script, Script) else Script(tuple(script))


def _checked(script: Script, request: Request) -> Script:
    """The script up to the first token that the request's constraint forbids; there it ends with "error"."""
    if not script.obeys_constraint or request.constraint is None:
        return script
    state = request.constraint.start()
    for place, token in enumerate(script.tokens):
        if state.is_complete:
            break
        try:
            state.advance(token if isinstance(token, int) else token.token_id)
        except Exception as error:
            return replace(script, tokens=script.tokens[:place], error=str(error))
    return script


def _cut(script: Script, request: Request, context_length: int) -> tuple[list[Token], FinishReason]:
    """The tokens that a real engine would have sent of this script, and why it would have ended."""
    params = request.sampling
    room = context_length - len(request.token_ids)
    room = room if params.max_tokens is None else min(room, params.max_tokens)
    tokens: list[Token] = []
    for token in script.tokens[:room]:
        tokens.append(_with_logprobs(token, params))
        if tokens[-1].token_id in request.stop_token_ids and not params.ignore_stop:
            return tokens, "stop"
    if script.error is not None and len(tokens) < room:
        return tokens, "error"
    return tokens, script.end if len(tokens) < room else "length"


def _with_logprobs(token: int | Token, params: SamplingParams) -> Token:
    """The token as asked for: log-probabilities only when the request wants them, and as many as it wants."""
    if params.logprobs is None:
        return Token(token if isinstance(token, int) else token.token_id)
    full = Token(token, 0.0, ((token, 0.0),)) if isinstance(token, int) else token
    return Token(full.token_id, full.logprob, full.top_logprobs[: params.logprobs])


def _events(tokens: list[Token], reason: FinishReason, error: str | None, size: int) -> list[TokenEvent]:
    events = [TokenEvent(tuple(tokens[i : i + size])) for i in range(0, len(tokens), size)]
    if reason == "error" or not events:
        return [*events, TokenEvent((), reason, error=error if reason == "error" else None)]
    return [*events[:-1], TokenEvent(events[-1].tokens, reason)]
