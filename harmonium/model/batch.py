"""What goes into one step of a model and what comes out: flat arrays, no objects of the engine.

Dimension letters: T tokens in the step, S sequences, B longest block table, R rows that need logits,
V vocabulary. Everything a step needs is in `Batch`; there is no global context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt

from harmonium.errors import RequestError

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off (a token needs at least min_p
    times the best token's probability). Filters apply in the order temperature, top_k, top_p, min_p.
    seed: None draws one; the same seed, prompt and settings give the same tokens.
    presence_penalty, frequency_penalty: subtracted for tokens that the answer holds already (OpenAI's rule).
    repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer.
    logit_bias: token id -> added to its logit. logprobs: how many alternatives to report with each token
    (None: none, 0: only the chosen token's log-probability). max_tokens: None fills the context.
    ignore_stop: go on after a stop token (for measuring).

    Log-probabilities are those of the distribution after penalties and bias, before temperature and filters.
    Raises RequestError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    max_tokens: int | None = None
    ignore_stop: bool = False

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check_whole("top_k", self.top_k, 0, 1 << 30)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0; expected more than 0, at most 1")
        if self.seed is not None:
            _check_whole("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, 1, 1 << 30)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; expected token ids with their biases")
        for token, bias in self.logit_bias.items():
            _check_whole("logit_bias token id", token, 0, (1 << 31) - 1)
            _check(f"logit_bias of token {token}", bias, -100.0, 100.0)


def _check(name: str, value: float, low: float, high: float) -> None:
    # bool is a number to Python and none to a user. The comparison is written so that NaN fails it.
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; expected {low} to {high}")


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; expected {low} to {high}")


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What the sampler needs for one row of logits.

    key: 0 to 2^64 - 1, of this draw's random numbers: the caller derives it from seed and position, so that a
    preempted sequence draws the same. prompt_counts/answer_counts: token ids seen so far (unique ids and how
    often), only filled when a penalty is set. allowed_mask: None, or uint32 words of a token bit mask.
    """

    params: SamplingParams
    key: int
    prompt_token_ids: npt.NDArray[np.int32] | None = None
    answer_token_ids: npt.NDArray[np.int32] | None = None
    answer_counts: npt.NDArray[np.int32] | None = None
    allowed_mask: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One step over a flat batch of tokens.

    token_id_T, position_T: int32. Tokens of sequence s are rows query_start_S1[s] to query_start_S1[s + 1];
    their positions are consecutive and end at context_length_S[s] - 1.
    full_block_SB, window_block_SB: int32 block tables for the full-attention and the window layers: position
    p of a sequence lies in block table[p // P], slot p % P. -1: not allocated, or freed because it left the
    window; a step never reads it.
    logit_row_R: rows of T for which logits are computed. sampling: one for each of them, or None for a row
    whose logits are only returned. wants_logits: return logits_RV. adapter_S: which LoRA adapter of the
    runner's is a sequence's, by its place there; -1: none. None: no sequence has one.
    """

    token_id_T: npt.NDArray[np.int32]
    position_T: npt.NDArray[np.int32]
    query_start_S1: npt.NDArray[np.int32]
    context_length_S: npt.NDArray[np.int32]
    full_block_SB: npt.NDArray[np.int32]
    window_block_SB: npt.NDArray[np.int32]
    logit_row_R: npt.NDArray[np.int32]
    sampling: tuple[RowSampling | None, ...]
    wants_logits: bool = False
    adapter_S: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The chosen token. top_logprobs: (token id, log-probability), best first; empty unless asked."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """tokens: one for each row of logit_row_R (None where the row had no sampling)."""

    tokens: tuple[SampledToken | None, ...]
    logits_RV: npt.NDArray[np.float32] | None = None
