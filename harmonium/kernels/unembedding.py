"""The product with the unembedding: int8 in halves of four bits, of which logits may need the first alone.

    weight = quantize_unembedding(bits_VD)
    logits(x_RD, weight, out_RV)
    screened_logits(x_RD, weight, [Wish(keep=1)], out_RV)

What holds and why: native/split.cpp, docs/numerics.md. Arrays are checked as those of kernels/matmul.py are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harmonium import _native
from harmonium.kernels.matmul import F32, U8, Bf16, allocate

MAX_SCREENED_ROWS = 4
"""Rows of `screened_logits`; kScreenRows of native/matmul.h."""


@dataclass(frozen=True, slots=True)
class SplitWeight:
    """A weight [num_outputs, num_inputs] as -119..119 with a bf16 scale per 32 inputs (docs/kernels.md)."""

    data: U8
    num_outputs: int
    num_inputs: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Wish:
    """What a row of logits is for.

    keep: so many of the greatest allowed logits must be there, with all that equal the least of them.
    temperature: above 0, that logit must be there which a draw with `key` takes from the allowed ones at this
    temperature, without filters (kernels/sampling.py). Only one of the two may be set; with neither all that
    are allowed are there. allowed: uint32 words of a bit mask; None: every token.
    """

    keep: int = 0
    allowed: npt.NDArray[np.uint32] | None = None
    key: int = 0
    temperature: float = 0.0


def count_allowed(allowed: npt.NDArray[np.uint32]) -> int:
    """Bits that are set in a mask's words."""
    return int(_native.count_bits(allowed))


def split_bytes(num_outputs: int, num_inputs: int) -> int:
    """Bytes of a weight of that size."""
    return int(_native.split_bytes(num_outputs, num_inputs))


def quantize_unembedding(weight_VD: Bf16) -> SplitWeight:
    """Return the weight in new memory; weight_VD is read once."""
    if weight_VD.ndim != 2 or weight_VD.shape[1] % 32 != 0 or weight_VD.shape[1] == 0:
        raise ValueError(f"weight has shape {weight_VD.shape}; expected [V, D] with D a multiple of 32")
    num_outputs, num_inputs = weight_VD.shape
    weight = SplitWeight(allocate(split_bytes(num_outputs, num_inputs)), num_outputs, num_inputs)
    _native.quantize_split(weight_VD, weight.data)
    return weight


def logits(x_RD: F32, weight: SplitWeight, out_RV: F32) -> None:
    """Write x @ weight.T to out; x is quantized to int8 inside."""
    _native.linear_split(x_RD, weight.data, weight.num_outputs, out_RV)


def screened_logits(x_RD: F32, weight: SplitWeight, wishes: Sequence[Wish], out_RV: F32) -> float:
    """Write to each row of out what its wish asks for: the same bits as `logits`, or minus infinity.

    x: at most MAX_SCREENED_ROWS rows. That nothing that is asked for is missing is certain but for one row in
    2^60. Returns the share of the low halves that were read, 0 to 1: above a half it did not pay.
    """
    read = _native.screen_split(
        x_RD,
        weight.data,
        weight.num_outputs,
        [wish.keep for wish in wishes],
        [wish.key for wish in wishes],
        [wish.temperature for wish in wishes],
        [wish.allowed for wish in wishes],
        out_RV,
    )
    return float(read / -(-weight.num_outputs // 16))
