"""Specification of the kernels in kernels/ops.py, in NumPy. Signatures and shapes are those of that file.

Sums are taken in float64 and rounded to float32 once, so that a kernel's distance from here is its own error.
The rotary embedding is computed in float32: its results are stored as bf16, and must be the same to the bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "attention",
    "float32_from_bf16",
    "float32_from_int8",
    "gather_rows",
    "quantize_heads",
    "rms_norm",
    "rope_and_store",
    "round_to_bf16",
    "router",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bf16 = npt.NDArray[np.uint16]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_SCALE_GROUP = 32
"""Elements of a head that share a scale in an int8 cache."""


def float32_from_bf16(bits: Bf16) -> F32:
    """Return the numbers whose bf16 bits are given: bf16 is the upper half of float32."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def round_to_bf16(x: F32) -> Bf16:
    """Return the bf16 bits nearest to x; ties to even, NaN to a quiet NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    # Half of the last kept bit, minus one where that bit is even. NaN would overflow and is put right after.
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def quantize_heads(x_XK: F32) -> tuple[Int8, Bf16]:
    """Return x as int8, and a bf16 scale for each 32 elements of the last axis (the last may have fewer).

    A scale is the largest magnitude over 127, rounded up, so that quotients reach at most 127; they are
    rounded to nearest even. A group with a number that is not finite is 0 with the scale NaN.
    """
    K = x_XK.shape[-1]
    q_XK = np.empty(x_XK.shape, np.int8)
    scale_XS = np.empty((*x_XK.shape[:-1], -(-K // _SCALE_GROUP)), np.uint16)
    for column, begin in enumerate(range(0, K, _SCALE_GROUP)):
        group = x_XK[..., begin : begin + _SCALE_GROUP].astype(np.float32)
        is_finite = np.asarray(np.isfinite(group).all(axis=-1))
        group = np.where(is_finite[..., None], group, np.float32(0))
        exact = np.ascontiguousarray(np.abs(group).max(axis=-1) / np.float32(127)).view(np.uint32)
        bits = ((exact.astype(np.uint64) + 0xFFFF) >> 16).astype(np.uint16)
        divisor = float32_from_bf16(bits)[..., None]
        q_XK[..., begin : begin + _SCALE_GROUP] = np.rint(
            np.divide(group, divisor, out=np.zeros_like(group), where=divisor != 0)
        )
        scale_XS[..., column] = np.where(is_finite, bits, np.uint16(0x7FC0))
    return q_XK, scale_XS


def float32_from_int8(q_XK: Int8, scale_XS: Bf16) -> F32:
    """Return the numbers that `quantize_heads` gave."""
    repeated_XK = np.repeat(float32_from_bf16(scale_XS), _SCALE_GROUP, axis=-1)[..., : q_XK.shape[-1]]
    return np.asarray(q_XK * repeated_XK, np.float32)


def _float64(vector: F32 | Bf16) -> F64:
    if vector.dtype == np.uint16:
        return float32_from_bf16(vector.view(np.uint16)).astype(np.float64)
    return vector.astype(np.float64)


def rms_norm(x_TD: F32, weight_D: F32 | Bf16, eps: float, out_TD: F32) -> None:
    """Write x / sqrt(mean(x^2) + eps) * weight, row by row."""
    x = x_TD.astype(np.float64)
    out_TD[:] = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps) * _float64(weight_D)


def _rotated(x_TXK: F32, cos_TC: F32, sin_TC: F32) -> F32:
    half = x_TXK.shape[-1] // 2
    first, second = x_TXK[..., :half], x_TXK[..., half:]
    cos, sin = cos_TC[:, None, :], sin_TC[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_and_store(
    qkv_TX: F32,
    cos_TC: F32,
    sin_TC: F32,
    key_cache_NGPK: Bf16 | Int8,
    value_cache_NGPK: Bf16 | Int8,
    slot_T: Int64,
    num_heads: int,
    key_scale_NGPX: Bf16 | None = None,
    value_scale_NGPX: Bf16 | None = None,
) -> None:
    """Rotate q and k in place, then write k and v to their slots as bf16, or as int8 with scales."""
    _, G, P, K = key_cache_NGPK.shape
    heads = qkv_TX.reshape(len(qkv_TX), num_heads + 2 * G, K)  # a view
    heads[:, : num_heads + G] = _rotated(heads[:, : num_heads + G], cos_TC, sin_TC)
    places = slot_T // P, slice(None), slot_T % P
    for cache, scale, new in (
        (key_cache_NGPK, key_scale_NGPX, heads[:, num_heads : num_heads + G]),
        (value_cache_NGPK, value_scale_NGPX, heads[:, num_heads + G :]),
    ):
        if scale is None:
            cache[places] = round_to_bf16(new)
        else:
            cache[places], scale[places] = quantize_heads(new)


def _cached(cache_NGPK: Bf16 | Int8, scale_NGPX: Bf16 | None, block: Int32, offset: Int64) -> F64:
    """Keys or values at these places, [L, G, K]."""
    rows = cache_NGPK[block, :, offset]
    if scale_NGPX is None:
        return float32_from_bf16(rows.view(np.uint16)).astype(np.float64)
    return float32_from_int8(rows.view(np.int8), scale_NGPX[block, :, offset]).astype(np.float64)


def _attend_one(q_HK: F64, key_LGK: F64, value_LGK: F64, sink_H: F64, scale: float) -> F64:
    """One token against the L positions that it sees."""
    group_size = len(q_HK) // key_LGK.shape[1]
    key_LHK = np.repeat(key_LGK, group_size, axis=1)
    value_LHK = np.repeat(value_LGK, group_size, axis=1)
    score_HL = np.einsum("hk,lhk->hl", q_HK, key_LHK) * scale
    top_H = np.maximum(score_HL.max(axis=1), sink_H)
    weight_HL = np.exp(score_HL - top_H[:, None])
    total_H = weight_HL.sum(axis=1) + np.exp(sink_H - top_H)
    return np.asarray(np.einsum("hl,lhk->hk", weight_HL / total_H[:, None], value_LHK))


def attention(
    qkv_TX: F32,
    key_cache_NGPK: Bf16 | Int8,
    value_cache_NGPK: Bf16 | Int8,
    block_SB: Int32,
    query_start_S1: Int32,
    context_length_S: Int32,
    sink_H: F32 | Bf16,
    window: int,
    scale: float,
    out_TX: F32,
    key_scale_NGPX: Bf16 | None = None,
    value_scale_NGPX: Bf16 | None = None,
) -> None:
    """Attend from every token to the positions of its sequence that it sees, token by token."""
    _, _, P, K = key_cache_NGPK.shape
    sinks = _float64(sink_H)
    for s, context in enumerate(context_length_S):
        first, end = int(query_start_S1[s]), int(query_start_S1[s + 1])
        for row in range(first, end):
            position = int(context) - (end - row)
            seen = np.arange(max(0, position - window + 1) if window else 0, position + 1)
            block, offset = block_SB[s, seen // P], seen % P
            out = _attend_one(
                qkv_TX[row, : len(sinks) * K].reshape(len(sinks), K).astype(np.float64),
                _cached(key_cache_NGPK, key_scale_NGPX, block, offset),
                _cached(value_cache_NGPK, value_scale_NGPX, block, offset),
                sinks,
                scale,
            )
            out_TX[row] = out.reshape(-1)


def router(
    x_TD: F32,
    weight_ED: Bf16,
    bias_E: F32 | Bf16,
    expert_id_TA: Int32,
    expert_weight_TA: F32,
    extra_TE: F32 | None = None,
) -> None:
    """Choose the highest logits (equal ones: lower id first; NaN counts as lowest) and their softmax."""
    logit_TE = x_TD.astype(np.float64) @ _float64(weight_ED).T + _float64(bias_E)
    if extra_TE is not None:
        logit_TE = logit_TE + extra_TE
    # NaN sorts last, and a stable sort keeps lower ids first.
    expert_id_TA[:] = np.argsort(-logit_TE, axis=1, kind="stable")[:, : expert_id_TA.shape[1]]
    chosen_TA = np.take_along_axis(logit_TE, expert_id_TA.astype(np.int64), axis=1)
    weight_TA = np.exp(chosen_TA - chosen_TA[:, :1])
    expert_weight_TA[:] = weight_TA / weight_TA.sum(axis=1, keepdims=True)


def gather_rows(table_VD: Bf16, token_id_T: Int32, out_TD: F32) -> None:
    """Write the rows token_id_T of a bf16 table as float32."""
    out_TD[:] = float32_from_bf16(table_VD[token_id_T])
