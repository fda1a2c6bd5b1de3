"""Specification of the sampling kernels in NumPy: one row of logits, in float64, with full sorts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["adjust_logits", "draw_by_id", "keep_filtered", "log_probabilities", "top_logprobs"]

MIN_TEMPERATURE = 1e-6
"""Lower temperatures (but 0, which is greedy) are computed as this one."""


def adjust_logits(
    logits_V: npt.NDArray[np.float32],
    *,
    allowed: npt.NDArray[np.uint32] | None = None,
    prompt_ids: npt.NDArray[np.int32] | None = None,
    answer_ids: npt.NDArray[np.int32] | None = None,
    answer_counts: npt.NDArray[np.int32] | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    bias_ids: npt.NDArray[np.int32] | None = None,
    bias: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """The logits after mask, repetition penalty, presence and frequency penalty, and bias, in this order.

    Source: OpenAI's API reference for presence and frequency penalty (logit -= count * frequency + presence
    for a token that the answer holds); CTRL, arXiv 1909.05858, section 4.1, for the repetition penalty, in
    the form that Transformers gave it (negative logits are multiplied).
    """
    x_V = np.array(logits_V, np.float32)
    if allowed is not None:
        bit_V = np.unpackbits(allowed.view(np.uint8), bitorder="little")[: len(x_V)]
        x_V[bit_V == 0] = -np.inf
    seen = [ids for ids in (prompt_ids, answer_ids) if ids is not None]
    if seen and repetition_penalty != 1.0:
        ids = np.unique(np.concatenate(seen))
        penalty = np.float32(repetition_penalty)
        x_V[ids] = np.where(x_V[ids] > 0, x_V[ids] / penalty, x_V[ids] * penalty)
    if answer_ids is not None and answer_counts is not None:
        cost = frequency_penalty * answer_counts + presence_penalty * (answer_counts > 0)
        x_V[answer_ids] -= cost.astype(np.float32)
    if bias_ids is not None and bias is not None:
        x_V[bias_ids] += bias
    return x_V


def log_probabilities(x_V: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """log softmax. Logits of plus infinity share the probability evenly and leave none to the others."""
    x_V = _finite_at_the_top(x_V)
    shifted_V = x_V.astype(np.float64) - x_V.max()
    with np.errstate(under="ignore"):
        return np.asarray(shifted_V - np.log(np.exp(shifted_V).sum()), np.float64)


def top_logprobs(x_V: npt.NDArray[np.float32], count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens that have any probability, ties by the lower id."""
    logprob_V = log_probabilities(x_V)
    best = _by_rank(x_V)[:count]
    return [(int(i), float(logprob_V[i])) for i in best if logprob_V[i] > -np.inf]


def keep_filtered(
    x_V: npt.NDArray[np.float32], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> npt.NDArray[np.float64]:
    """Probabilities, not normalized, of what temperature, top_k, top_p and min_p leave; 0 for all others.

    Each filter keeps the best tokens by rank (logit, ties by the lower id): top_k their number; top_p the
    fewest whose probabilities, among those that top_k left, sum to at least top_p; min_p those with at least
    min_p times the best one's probability.
    """
    x_V = _finite_at_the_top(x_V)
    temperature = max(temperature, MIN_TEMPERATURE)
    with np.errstate(under="ignore", over="ignore"):
        e_V = np.exp((x_V.astype(np.float64) - x_V.max()) / temperature)
    rank = _by_rank(x_V)
    if top_k:
        rank = rank[:top_k]
    if top_p < 1.0:
        cumulative = np.cumsum(e_V[rank])
        rank = rank[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]
    rank = rank[e_V[rank] >= min_p]
    kept_V: npt.NDArray[np.float64] = np.zeros(len(e_V), np.float64)
    kept_V[rank] = e_V[rank]
    return kept_V


def draw_by_id(kept_V: npt.NDArray[np.float64], uniform: float) -> int:
    """Inverse CDF with the ids ascending: the first token at which the running sum passes uniform * sum."""
    cumulative = np.cumsum(kept_V)
    found = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(found, int(np.flatnonzero(kept_V)[-1]))


def _by_rank(x_V: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    rank: npt.NDArray[np.int64] = np.argsort(-x_V, kind="stable")
    return rank


def _finite_at_the_top(x_V: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if x_V.max() < np.inf:
        return x_V
    flat_V: npt.NDArray[np.float32] = np.where(x_V == np.inf, 0.0, -np.inf).astype(np.float32)
    return flat_V
