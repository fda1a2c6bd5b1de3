"""Experts that are in memory one by one, wherever there was room: products in several calls, the same bits.

Arrays as in kernels/matmul.py. `moe_parts` computes some experts of a step, as many calls as it takes;
`add_moe_parts` adds what they gave in the order of `moe_mxfp4`, so that the result does not depend on which
experts were computed together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from harmonium import _native
from harmonium.kernels.matmul import F32, U8, Activations, Bf16, ExpertAdapter, Int32

PLACE_COLUMNS = 4
"""Columns of a table of places: gate_up, its scales, down, its scales."""


def moe_parts(
    x_TD: F32,
    expert_id_TA: Int32,
    expert_weight_TA: F32,
    pool: U8,
    place_EC: npt.NDArray[np.int64],
    ggml: tuple[bool, bool] | None,
    gate_up_bias: Bf16,
    down_bias: Bf16,
    parts_TAD: F32,
    limit: float,
    alpha: float,
    activations: Activations = "int8",
    adapters: Sequence[ExpertAdapter] | None = None,
    adapter_T: Int32 | None = None,
) -> None:
    """Write to parts the weighted result of every (token, expert) whose id is not negative; leave the others.

    pool: uint8 [bytes]. place_EC: first byte in the pool of each expert's parts, int64 [E, 4]; only those of
    the experts in expert_id are looked at. ggml: None for our layout; else (gate and up are two matrices, a
    block's nibbles are split), and the place of gate_up's scales is that of the second matrix, down's unused.
    Raises IndexError for an id that is too large, ValueError for a place outside the pool.
    """
    _native.moe_parts(
        x_TD,
        expert_id_TA,
        expert_weight_TA,
        pool,
        place_EC,
        ggml,
        gate_up_bias,
        down_bias,
        parts_TAD,
        limit,
        alpha,
        activations,
        adapters,
        adapter_T,
    )


def add_moe_parts(parts_TAD: F32, out_TD: F32) -> None:
    """Add each token's parts to out, as `moe_mxfp4` does: summed in the order of the active experts first."""
    _native.add_moe_parts(parts_TAD, out_TD)
