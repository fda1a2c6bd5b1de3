"""Products with experts as GGUF files hold them, and what turns ggml's blocks into ours.

Arrays as in kernels/matmul.py. The specification of the blocks is checkpoint/gguf_blocks.py; a row has 17
bytes (MXFP4) or 34 (Q8_0) for every 32 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harmonium import _native
from harmonium.kernels.matmul import (
    F32,
    U8,
    Activations,
    Bf16,
    ExpertAdapter,
    Int8Weight,
    Int32,
    empty_panels,
)


def moe_ggml(
    x_TD: F32,
    expert_id_TA: Int32,
    expert_weight_TA: F32,
    gate: U8,
    up: U8 | None,
    is_split: bool,
    gate_up_bias: Bf16,
    down: U8,
    down_bias: Bf16,
    out_TD: F32,
    limit: float,
    alpha: float,
    activations: Activations = "int8",
    adapters: Sequence[ExpertAdapter] | None = None,
    adapter_T: Int32 | None = None,
) -> None:
    """Add to out what `moe_mxfp4` adds, to the bit, for ggml's blocks.

    gate and up [E, F, 17 D/32], or up None and gate [E, 2F, 17 D/32] with both in turn; down [E, D, 17 F/32].
    is_split: a block's nibbles lie in ggml's order. Each tile of rows is put in our order when it is used.
    """
    _native.moe_ggml(
        x_TD,
        expert_id_TA,
        expert_weight_TA,
        gate,
        up,
        is_split,
        gate_up_bias,
        down,
        down_bias,
        out_TD,
        limit,
        alpha,
        activations,
        adapters,
        adapter_T,
    )


def read_ggml(first: U8, second: U8 | None, is_split: bool) -> tuple[U8, U8]:
    """One expert's rows [N, 17 n] in our layout: blocks [N, n, 16] and scales [N, n], in new memory.

    second: rows that come in turn with the first ones. On the caller's thread alone, without the GIL.
    """
    num_rows, num_blocks = first.shape[0] * (1 if second is None else 2), first.shape[1] // 17
    blocks = np.empty((num_rows, num_blocks, 16), np.uint8)
    scales = np.empty((num_rows, num_blocks), np.uint8)
    _native.read_ggml(first, second, is_split, blocks, scales)
    return blocks, scales


def q8_to_bf16(rows: U8) -> Bf16:
    """Q8_0 rows [N, 34 n] as bf16 bits [N, 32 n], to nearest even, in new memory; threads share the work."""
    out = np.empty((rows.shape[0], rows.shape[1] // 34 * 32), np.uint16)
    _native.q8_to_bf16(rows, out)
    return out


def panels_of_q8(rows: U8) -> Int8Weight:
    """Q8_0 rows [N, 34 n] as an int8 weight, in new memory; threads share the work.

    The integers are the file's, so nothing is rounded but the scales: float16 to bf16, at most one part in
    512. One that is no number becomes NaN.
    """
    weight = empty_panels(rows.shape[0], rows.shape[1] // 34 * 32)
    _native.q8_to_panels(rows, weight.panels)
    return weight
