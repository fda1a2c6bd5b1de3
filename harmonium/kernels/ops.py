"""The typed face of the kernels that are no matrix products.

Arrays are C-contiguous; `out` arrays are written whole. Every function raises ValueError, naming the
argument, its value and what was expected, for a wrong dtype, shape or stride, and for slots, token ids and
block ids outside their arrays. The GIL is released while a kernel runs. Results are the same for any number
of threads.

Short vectors (a norm's weight, the router's bias, the sinks) may be float32 or, as in a checkpoint, bf16 bits
in uint16. Dimension letters: docs/architecture.md.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from harmonium import _native

F32 = npt.NDArray[np.float32]
Bf16 = npt.NDArray[np.uint16]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

SCALE_GROUP = 32
"""Elements of a head that share a scale in an int8 cache; the last group of a head may be shorter."""


def rms_norm(x_TD: F32, weight_D: F32 | Bf16, eps: float, out_TD: F32) -> None:
    """Write x / sqrt(mean(x^2) + eps) * weight, row by row, to out_TD, which may be x_TD.

    Source: openai/gpt-oss, gpt_oss/torch/model.py (RMSNorm).
    """
    _native.rms_norm(x_TD, weight_D, eps, out_TD)


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
    """Rotate q and k in place, then write k and v to their cache slots, rounded to nearest even.

    The cache is bf16 and has no scales; or int8, with a bf16 scale for each SCALE_GROUP elements of a head in
    ceil(K / SCALE_GROUP) columns: the largest magnitude over 127, rounded up, and NaN for a group in which a
    number is not finite.

    qkv_TX: rows of q (H*K), k (G*K), v (G*K). cos_TC, sin_TC: K/2 columns, with YaRN's attention factor in
    them. Halves are rotated, not pairs: element i goes with element i + K/2. slot_T: block * P + offset, all
    different. The head size K must be a multiple of 8.

    Source: openai/gpt-oss, gpt_oss/torch/model.py (_apply_rotary_emb).
    """
    _native.rope_and_store(
        qkv_TX,
        cos_TC,
        sin_TC,
        key_cache_NGPK,
        value_cache_NGPK,
        slot_T,
        num_heads,
        key_scale_NGPX,
        value_scale_NGPX,
    )


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
    """Attend from every token of the batch to its sequence's cached keys, its own among them.

    The cache is bf16, or int8 with scales, as rope_and_store writes it: numbers are converted to float32 as
    they are read.

    qkv_TX: as rope_and_store leaves it; only q is read, and keys and values come from the cache. Tokens of
    sequence s are rows query_start_S1[s] to query_start_S1[s + 1], at the last positions before
    context_length_S[s]. Position p lies in block block_SB[s, p // P]; entries whose positions no token may
    see are not read. window: positions that a token sees, its own included; 0 for all. sink_H: a logit for
    each query head that joins the softmax's denominator and has no value. Query head h uses key/value head
    h // (H/G). out_TX: H*K columns.

    Source: openai/gpt-oss, gpt_oss/torch/model.py (sdpa).
    """
    _native.attention(
        qkv_TX,
        key_cache_NGPK,
        value_cache_NGPK,
        block_SB,
        query_start_S1,
        context_length_S,
        sink_H,
        window,
        scale,
        out_TX,
        key_scale_NGPX,
        value_scale_NGPX,
    )


def attention_scratch_bytes(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_tokens: int,
    num_sequences: int,
    max_context: int,
    num_threads: int,
) -> int:
    """Return an upper bound for the memory, in bytes, that `attention` holds beside its arguments.

    For steps of up to num_tokens tokens in up to num_sequences sequences of up to max_context positions.
    """
    return int(
        _native.attention_scratch_bytes(
            num_heads, num_kv_heads, head_size, num_tokens, num_sequences, max_context, num_threads
        )
    )


def router(
    x_TD: F32,
    weight_ED: Bf16,
    bias_E: F32 | Bf16,
    expert_id_TA: Int32,
    expert_weight_TA: F32,
    extra_TE: F32 | None = None,
) -> None:
    """Choose each token's A experts: the highest logits of x . weight + bias, and the softmax over those.

    extra_TE: added to the logits.

    Written to expert_id_TA, best first (equal logits: lower id first; NaN counts as lowest, so ids are always
    valid and different), and expert_weight_TA.

    Source: openai/gpt-oss, gpt_oss/torch/model.py (MLPBlock).
    """
    _native.router(x_TD, weight_ED, bias_E, expert_id_TA, expert_weight_TA, extra_TE)


def gather_rows(table_VD: Bf16, token_id_T: Int32, out_TD: F32) -> None:
    """Write the rows token_id_T of a bf16 table to out_TD as float32."""
    _native.gather_rows(table_VD, token_id_T, out_TD)
