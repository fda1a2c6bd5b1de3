"""Specification of the sampling kernels in NumPy: one row of logits, in float64, with full sorts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["adjust_logits", "draw_token", "keep_filtered", "log_probabilities", "noise", "top_logprobs"]

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


def noise(key: int, num_tokens: int) -> npt.NDArray[np.float64]:
    """Independent standard Gumbel noise for tokens 0 to num_tokens - 1, a function of key and token.

    Minus the logarithm of an exponential waiting time. Sixteen tokens (a panel) get theirs together: the
    first of sixteen is as long as one of rate 16, each of them is it with the same probability, and the
    others take that long and, since such times have no memory, another exponential time of their own. Number
    p of the key's sequence makes the first time of panel p, its low four bits say whose it is; number
    2^32 + i is of token i.

    To the bit what native/noise.h computes. Source of the numbers: SplitMix64, S. Vigna.
    """
    token_V = np.arange(num_tokens, dtype=np.uint64)
    first_V = _numbers(key, token_V >> np.uint64(4))
    time_V = _waiting_time(first_V) / 16
    is_first_V = (first_V & np.uint64(15)) == (token_V & np.uint64(15))
    own_V = _waiting_time(_numbers(key, token_V + np.uint64(1 << 32)))
    return -_natural_log(np.where(is_first_V, time_V, time_V + own_V))


def draw_token(
    x_V: npt.NDArray[np.float32], is_kept_V: npt.NDArray[np.bool_], temperature: float, key: int
) -> int:
    """The kept token whose logit / temperature + noise is the greatest: a draw from their softmax.

    Among equals the greater logit, then the greater noise. Source: the Gumbel-max trick, e.g. Maddison,
    Tarlow, Minka 2014 (arXiv:1411.0030), section 2.
    """
    x_V = _finite_at_the_top(x_V)
    noise_V = noise(key, len(x_V))
    score_V = x_V.astype(np.float64) * (1 / max(temperature, MIN_TEMPERATURE)) + noise_V
    score_V[~is_kept_V] = -np.inf
    best = np.flatnonzero(score_V == score_V.max())
    return int(best[np.lexsort((noise_V[best], x_V[best]))[-1]])


def _numbers(key: int, n_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z_N = np.uint64(key) + (n_N + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # arrays wrap silently
    z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed_N: npt.NDArray[np.uint64] = z_N ^ (z_N >> np.uint64(31))
    return mixed_N


def _waiting_time(number_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Exponentially distributed, mean 1, of a fraction that is an odd multiple of 2^-53."""
    fraction_N = ((number_N >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -_natural_log(1 - fraction_N)


def _natural_log(x_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """ln by operations that round alike on every machine, within 2e-15 of the result or 4e-15."""
    bits_N = x_N.view(np.int64)
    exponent_N = (bits_N - 0x3FE6A09E00000000) >> 52  # so that the rest lies around 1
    rest_N = (bits_N - (exponent_N << 52)).view(np.float64)
    s_N = (rest_N - 1) / (rest_N + 1)
    z_N = s_N * s_N
    series_N = np.full_like(z_N, 1.0 / 19)
    for odd in (17, 15, 13, 11, 9, 7, 5, 3):
        series_N = series_N * z_N + 1.0 / odd
    return exponent_N.astype(np.float64) * 0.6931471805599453 + (2 * s_N + 2 * s_N * (z_N * series_N))


def _by_rank(x_V: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    rank: npt.NDArray[np.int64] = np.argsort(-x_V, kind="stable")
    return rank


def _finite_at_the_top(x_V: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if x_V.max() < np.inf:
        return x_V
    flat_V: npt.NDArray[np.float32] = np.where(x_V == np.inf, 0.0, -np.inf).astype(np.float32)
    return flat_V
