"""Guesses of the next tokens, so that one step can check several instead of computing one.

A guess is free to be wrong: the engine computes logits behind each guessed token, draws from each row what it
would have drawn there anyway (a draw is a function of seed and position), and keeps tokens for as long as the
draws equal the guess. So the answer, its distribution and its log-probabilities are those of an engine that
guesses nothing; only the number of steps differs.

The default guess is prompt look-up: when the last tokens have come before, what followed them then follows
again (code that is edited, JSON, quoted tool results).

Source: speculative decoding, Leviathan et al. 2023 (arXiv:2211.17192); prompt look-up, A. Saxena 2023
(github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.model_config import ModelConfig
from harmonium.model.costs import step_cost

MAX_DRAFT_TOKENS = 31
"""Most tokens guessed for one sequence: with the token before them they fill a tile of logit rows."""

_LEAST_MATCH = 3
"""Tokens that must have come before in the same order. Two recur by chance in any text."""

_MOST_MATCH = 24
"""Where the search for the longest match stops."""

_FIRST_LENGTH = 4
"""Tokens of a sequence's first guess; it doubles while guesses come true and shrinks when they fail."""

_FIRST_CREDIT = 2.0
_MOST_CREDIT = 16.0
_CREDIT_PER_STEP = 0.02
"""Of the cost of a step: what failed guesses may cost, so at most 2 % of the time plus two steps."""

_OPERATIONS_PER_BYTE = 40.0
"""Multiplications and additions while a byte is read; two cores of a server do 40 to 50."""


class Drafter(Protocol):
    """Whatever guesses: prompt look-up here; a small model or an EAGLE head could be another."""

    def propose(self, token_ids: npt.NDArray[np.int32], max_tokens: int) -> npt.NDArray[np.int32]:
        """At most max_tokens tokens, maybe none, that may follow token_ids: a sequence's tokens so far."""
        ...


class PromptLookup:
    """Guesses that what followed the last tokens when they came before follows again."""

    def propose(self, token_ids: npt.NDArray[np.int32], max_tokens: int) -> npt.NDArray[np.int32]:
        """What followed the longest earlier match of the end of token_ids; of equally long ones the latest.

        Looks at all tokens once, and further at those only that equal the last one: 30 microseconds at
        131,072 tokens.
        """
        last = len(token_ids) - 1
        if max_tokens < 1 or last < _LEAST_MATCH:
            return token_ids[:0]
        ends = np.flatnonzero(token_ids[:last] == token_ids[last])
        length, longest = 1, ends[:0]
        while len(ends) and length < _MOST_MATCH:
            if length >= _LEAST_MATCH:
                longest = ends
            ends = ends[ends >= length]
            ends = ends[token_ids[ends - length] == token_ids[last - length]]
            length += 1
        if len(ends):
            longest = ends
        if not len(longest):
            return token_ids[:0]
        start = int(longest[-1]) + 1
        return token_ids[start : start + max_tokens]


class DraftBudget:
    """How many tokens one sequence may have guessed now, so that wrong guesses cost little.

    Counted in steps of one token. Each step earns a little credit, a guess takes what its tokens add to the
    step, and each token that came true gives back the share of a step that it saved.
    """

    __slots__ = ("_credit", "_length")

    def __init__(self) -> None:
        self._credit = _FIRST_CREDIT
        self._length = _FIRST_LENGTH

    def allowance(self, num_tokens: int, cost: Callable[[int], float]) -> int:
        """Tokens that may be guessed in a step of num_tokens tokens; cost: of a step, by its tokens."""
        allowed = self._length
        base = cost(num_tokens)
        while allowed and (cost(num_tokens + allowed) - base) / cost(1) > self._credit:
            allowed -= 1
        return allowed

    def settle(self, num_guessed: int, num_true: int, num_tokens: int, cost: Callable[[int], float]) -> None:
        """A step of num_tokens tokens beside the guess is over; num_guessed may be 0."""
        unit = cost(1)
        spent = (cost(num_tokens + num_guessed) - cost(num_tokens)) / unit
        saved = num_true * cost(num_tokens) / unit / max(1, num_tokens)
        self._credit = min(_MOST_CREDIT, self._credit + _CREDIT_PER_STEP + saved - spent)
        if num_guessed:
            grown = 2 * self._length if num_true >= min(num_guessed, self._length) else num_true + 1
            self._length = max(1, min(MAX_DRAFT_TOKENS, grown))


def decode_cost(config: ModelConfig, streams_experts: bool = False) -> Callable[[int], float]:
    """What a step of so many tokens costs, in bytes read; more when arithmetic is the limit.

    By the weights alone, experts chosen evenly (model.costs): only ratios are used. streams_experts: by the
    experts alone, for the disk takes so long that nothing else counts.
    """
    if streams_experts:
        share = config.num_active_experts / config.num_experts
        return lambda num_tokens: 1 - (1 - share) ** num_tokens

    @lru_cache(maxsize=1024)
    def cost(num_tokens: int) -> float:
        step = step_cost(
            config,
            "int8",
            num_tokens=num_tokens,
            num_sequences=1,
            num_logit_rows=num_tokens,
            context=0,
        )
        return step.least_seconds(1.0, _OPERATIONS_PER_BYTE)

    return cost
