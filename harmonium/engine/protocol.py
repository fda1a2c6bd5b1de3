"""Seam A: whatever continues token sequences: our own engine, vLLM over HTTP, Ray, a script."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from harmonium.config import LoraSource
from harmonium.engine.constraint import Constraint
from harmonium.model.batch import SamplingParams

FinishReason = Literal["stop", "length", "aborted", "error"]
"""stop: a stop token came (the last token of the event). length: max_tokens or the context was reached."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """model_name: what to call it. context_length: prompt plus answer, in tokens. vocabulary_size: ids are
    below it. engine: which one it is ("local", "scripted"). adapters: names of the LoRA adapters that a
    request may ask for.
    """

    model_name: str
    context_length: int
    vocabulary_size: int
    engine: str
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue.

    token_ids: the prompt, at least one token. stop_token_ids: the answer ends after one of these; for Harmony
    these are <|return|> and <|call|>. max_tokens None: until the context is full. cache_salt: sequences share
    cached prefixes only with the same salt. constraint: which tokens may come; None: any. Tokens that it
    forces are appended without sampling (log-probability 0: there was no other), and the answer ends with
    "stop" when it is complete. adapter: the LoRA adapter to compute with, by its name; None: the model as it
    is. answer_token_ids: the beginning of an answer that was cut off elsewhere. It goes on behind them as if
    nothing had happened (they count for max_tokens, penalties, draws and the constraint), and its events
    tell the tokens after them. With a seed, or greedy, those are the ones that would have come.

    A request can be pickled where its constraint can (for engines in other processes).
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    constraint: Constraint | None = None
    adapter: str | None = None
    answer_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the answer; logprob and top_logprobs only when the request asked for them."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """News of one request: the tokens since the last event (at least one, except in a final event).

    finish_reason: set in the last event and only there. num_cached_tokens: prompt tokens that came from the
    prefix cache. error: what went wrong, when finish_reason is "error". began: when the request left the
    queue (time.monotonic()); None where the engine does not say.
    """

    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    began: float | None = field(default=None, compare=False)


class Engine(Protocol):
    """Continues token sequences. Knows no text, no Harmony, no HTTP."""

    @property
    def info(self) -> EngineInfo: ...

    def admit(self, request: Request) -> None:
        """Check that the request can be served. Raises PromptTooLong, RequestError, EngineBusy, EngineClosed.

        Nothing is reserved: a caller that was admitted may still meet EngineBusy from `generate`.
        """
        ...

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Continue the sequence; the last event has a finish_reason. Closing the generator aborts it.

        The request is queued when the first event is asked for; that raises what `admit` raises.
        """
        ...

    async def close(self) -> None:
        """End running requests with "aborted" and give everything back."""
        ...


@runtime_checkable
class PromptScorer(Protocol):
    """An engine that also says how likely a prompt's own tokens are; evaluation tools ask for it."""

    async def score(
        self, token_ids: tuple[int, ...], num_top: int, adapter: str | None = None
    ) -> tuple[Token, ...]:
        """Each token with its log-probability after those before it, and the num_top likeliest in its place.

        adapter: the LoRA adapter to compute with. The first token has none (logprob None). Raises what
        `Engine.admit` raises, and EngineError.
        """
        ...


@runtime_checkable
class AdapterHost(Protocol):
    """An engine whose LoRA adapters may change while it serves."""

    async def load_adapter(self, source: LoraSource) -> None:
        """Serve one more. Raises ConfigError, CheckpointError, MemoryPlanError, EngineClosed, EngineError."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """No new request may ask for it; those that use it go on. Raises RequestError when there is none."""
        ...
