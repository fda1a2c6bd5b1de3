"""One request while it is served: its tokens, where it stands, and what its sampling needs."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
import numpy.typing as npt

from harmonium.engine.adapters import ServedAdapter, cache_key
from harmonium.engine.blocks import Lease
from harmonium.engine.constraint import ConstraintState
from harmonium.engine.drafts import DraftBudget
from harmonium.engine.protocol import FinishReason, Request
from harmonium.model.batch import RowSampling, SampledToken, SamplingParams

_GROWTH = 256
"""Token ids that a sequence's array has room for beyond its prompt at first; it doubles from there."""


def draw_key(seed: int, position: int) -> int:
    """The key, 0 to 2^64 - 1, of the random numbers that choose the token at a position.

    A function of seed and position alone, so that batching, chunking and preemption change no draw.
    """
    digest = blake2b(
        struct.pack("<QQ", seed & (2**64 - 1), position), digest_size=8, person=b"harmonium draw"
    ).digest()
    return int.from_bytes(digest, "little")


class LogitsSink(Protocol):
    """Takes logits piece by piece, on the engine's thread; a list is one."""

    def append(self, logits_TV: npt.NDArray[np.float32], /) -> None:
        """The logits of the next positions, the sink's own."""
        ...


class AnswerCounts:
    """How often each token id came in an answer, kept up token by token."""

    def __init__(self) -> None:
        self._place_of: dict[int, int] = {}
        self._token_ids = np.zeros(16, np.int32)
        self._counts = np.zeros(16, np.int32)

    def add(self, token_id: int) -> None:
        """Count one more token."""
        place = self._place_of.setdefault(token_id, len(self._place_of))
        if place == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[place] = token_id
        self._counts[place] += 1

    def copy(self) -> AnswerCounts:
        """Counts that go on by themselves."""
        twin = AnswerCounts()
        twin._place_of = dict(self._place_of)
        twin._token_ids, twin._counts = self._token_ids.copy(), self._counts.copy()
        return twin

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """Each token id once, in order of first appearance."""
        return self._token_ids[: len(self._place_of)]

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """How often each of `token_ids` came."""
        return self._counts[: len(self._place_of)]


@dataclass(frozen=True, slots=True)
class Advance:
    """The tokens that a sequence got, how many of them its constraint forced, and why it ended with them, or
    None.
    """

    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    num_forced: int = 0


class Sequence:
    """A request's tokens and where it stands. Compared by identity.

    max_total: tokens, prompt included, at which it ends with "length". num_cached_tokens: prompt tokens that
    came from the prefix cache when it first ran, began: when that was (time.monotonic()). lease: what it
    holds of the cache, None while it waits. blocked_at: the pool's release count when it last found no room
    (see Scheduler). chunk_limit: most tokens that one step computes of it. returned_logits: None, or what
    takes float32 [t, V] pieces, all its positions' logits; nothing is sampled then. error: what its
    constraint raised, which ended it.
    drafts: how many of its next tokens may be guessed. adapter_index: the runner's place of its LoRA adapter,
    -1: none. cache_key: it shares cached prefixes with those of the same key.
    """

    __slots__ = (
        "_constraint", "_counts", "_masks", "_prompt_token_ids", "_token_ids", "adapter_index", "began",
        "blocked_at", "cache_key", "chunk_limit", "drafts", "error", "lease", "max_total",
        "num_cached_tokens", "num_prompt", "num_tokens", "request", "returned_logits", "seed",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        context_length: int,
        logits_chunk: int = 0,
        logits_sink: LogitsSink | None = None,
        adapter: ServedAdapter | None = None,
    ) -> None:
        self.request = request
        self.adapter_index = -1 if adapter is None else adapter.index
        self.cache_key = cache_key(adapter, request.cache_salt)
        params = request.sampling
        self.seed = params.seed if params.seed is not None else secrets.randbits(64)
        self.num_prompt = self.num_tokens = len(request.token_ids)
        answer_limit = params.max_tokens if params.max_tokens is not None else context_length
        self.max_total = min(context_length, self.num_prompt + answer_limit)
        self._token_ids = np.zeros(
            min(self.num_prompt + _GROWTH, max(self.max_total, self.num_prompt)), np.int32
        )
        self._token_ids[: self.num_prompt] = request.token_ids
        self.num_cached_tokens: int | None = None
        self.began: float | None = None
        self.lease: Lease | None = None
        self.blocked_at = -1
        self.chunk_limit = logits_chunk or context_length
        self.returned_logits = logits_sink
        self._prompt_token_ids = np.unique(self.token_ids) if params.repetition_penalty != 1.0 else None
        self._counts = AnswerCounts() if _has_penalty(params) else None
        self._constraint: ConstraintState | None = None
        self._masks: list[npt.NDArray[np.uint32]] = []
        self.drafts = DraftBudget()
        self.error: Exception | None = None
        for token_id in request.answer_token_ids:
            self.append(token_id)

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """All tokens so far; a view."""
        return self._token_ids[: self.num_tokens]

    @property
    def num_computed(self) -> int:
        """Positions whose keys and values are in the cache."""
        return self.lease.num_computed if self.lease is not None else 0

    @property
    def num_pending(self) -> int:
        """Tokens that the next logits wait for: 1 in decode, more in prefill."""
        return self.num_tokens - self.num_computed

    def begin(self) -> Advance:
        """Start the constraint: the tokens that it forces at the beginning, or behind a begun answer."""
        if self.request.constraint is None:
            return Advance()
        tokens: list[SampledToken] = []
        try:
            self._constraint = self.request.constraint.start()
            forced = _replay(self._constraint, self.request.answer_token_ids)
            reason = self._append_forced(self._constraint, tokens, forced)
        except Exception as error:
            self.error, reason = error, "error"
        return Advance(tuple(tokens), reason, len(tokens))

    def take(self, token: SampledToken) -> Advance:
        """Take the token that was sampled, and those that its constraint forces behind it."""
        tokens = [token]
        reason = self.append(token.token_id)
        state = self._constraint
        self._masks.clear()
        if state is not None and reason is None:
            try:
                state.advance(token.token_id)
                reason = self._append_forced(state, tokens)
            except Exception as error:
                self.error, reason = error, "error"
        return Advance(tuple(tokens), reason, len(tokens) - 1)

    def take_drafted(self, tokens: Sequence_[SampledToken | None], draft: tuple[int, ...]) -> Advance:
        """Take what was drawn at the next position and behind each token of a draft, while the draft is true.

        tokens: one more than the draft. Behind a token that the draft did not have, or that forced others,
        nothing is taken: what was drawn there followed another text.
        """
        taken: list[SampledToken] = []
        num_forced = 0
        for token, guess in zip(tokens, (*draft, None), strict=True):
            assert token is not None
            advance = self.take(token)
            taken.extend(advance.tokens)
            num_forced += advance.num_forced
            if advance.finish_reason is not None or advance.num_forced or token.token_id != guess:
                break
        return Advance(tuple(taken), advance.finish_reason, num_forced)

    def prepare_masks(self, draft: tuple[int, ...]) -> tuple[int, ...] | None:
        """Work out which tokens may come next, and behind each token of a draft.

        Returns the draft up to the first token that may not come or that forces others; None when the
        constraint raised, which ends the sequence.
        """
        if self._constraint is None:
            return draft
        try:
            self._masks = [self._constraint.mask()]
            state = self._constraint.copy() if draft else self._constraint
            for i, token_id in enumerate(draft):
                if not self._masks[-1][token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1):
                    return draft[:i]
                state.advance(token_id)
                if state.is_complete or state.forced_tokens():
                    return draft[:i]
                self._masks.append(state.mask())
        except Exception as error:
            self.error = error
            return None
        return draft

    def _append_forced(
        self, state: ConstraintState, tokens: list[SampledToken], forced: Sequence_[int] = ()
    ) -> FinishReason | None:
        """Append what must come, and list it in `tokens`; why the sequence ends with it, or None.

        forced: what is known to come first.
        """
        wanted = self.request.sampling.logprobs
        while not state.is_complete:
            following, forced = forced or state.forced_tokens(), ()
            if not following:
                return None
            for token_id in following:
                reason = self.append(token_id)
                logprob = None if wanted is None else 0.0
                tokens.append(SampledToken(token_id, logprob, ((token_id, 0.0),) if wanted else ()))
                if reason is not None:
                    return reason
                state.advance(token_id)
        return "stop"

    def append(self, token_id: int) -> FinishReason | None:
        """Add a token to the answer; why the sequence ends with it, or None."""
        if self.num_tokens == len(self._token_ids):
            room = min(2 * self.num_tokens, self.max_total)
            self._token_ids = np.concatenate([self._token_ids, np.zeros(room - self.num_tokens, np.int32)])
        self._token_ids[self.num_tokens] = token_id
        self.num_tokens += 1
        if self._counts is not None:
            self._counts.add(token_id)
        if token_id in self.request.stop_token_ids and not self.request.sampling.ignore_stop:
            return "stop"
        return "length" if self.num_tokens >= self.max_total else None

    def row_sampling(self, draft: tuple[int, ...] = ()) -> RowSampling:
        """What the sampler needs to choose the token after the sequence's own and those of a draft."""
        counts = self._counts
        if counts is not None and draft:
            counts = counts.copy()
            for token_id in draft:
                counts.add(token_id)
        return RowSampling(
            params=self.request.sampling,
            key=draw_key(self.seed, self.num_tokens + len(draft)),
            prompt_token_ids=self._prompt_token_ids,
            answer_token_ids=counts.token_ids if counts is not None else None,
            answer_counts=counts.counts if counts is not None else None,
            allowed_mask=self._masks[len(draft)] if self._masks else None,
        )


def _replay(state: ConstraintState, answer: Sequence_[int]) -> Sequence_[int]:
    """Tell a fresh state the tokens of a begun answer; those that must come next.

    It is asked what it forces at the same places as when they came first: asked in the midst of what it
    forced, it might see a choice.
    """
    place = 0
    while not state.is_complete:
        forced = state.forced_tokens()
        told = answer[place : place + max(1, len(forced))]
        for token_id in told:
            state.advance(token_id)
        place += len(told)
        if not told or len(told) < len(forced):
            return forced[len(told) :]
    for token_id in answer[place:]:
        state.advance(token_id)  # raises: nothing follows a complete answer
    return ()


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0
    )
