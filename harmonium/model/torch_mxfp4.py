"""MXFP4 in PyTorch: the twin of checkpoint/mxfp4.py, to the bit, on any device.

`dequantize` is exact in float32 and in bf16 (an MXFP4 number has one fraction bit). `fake_quantize_mxfp4`
rounds as an export does and lets the gradient through: training sees the numbers that will be shipped.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonium.checkpoint.mxfp4 import BLOCK_SIZE, FP4_VALUES, LARGEST_USEFUL_EXPONENT, NAN_SCALE, SCALE_BIAS

_SMALLEST_EXPONENT, _LARGEST_EXPONENT = 0, 2
"""Of E2M1's normal numbers 1 to 6; below 1 the step is the same as from 1 to 2."""


def _tables() -> tuple[Tensor, Tensor]:
    """(the two numbers of each byte [256, 2], the factor of each scale [256])."""
    byte = np.arange(256)
    numbers = np.array(FP4_VALUES, np.float32)
    pairs = np.stack((numbers[byte & 15], numbers[byte >> 4]), axis=-1)
    factors = np.ldexp(np.float32(1), np.minimum(byte, NAN_SCALE - 1) - SCALE_BIAS).astype(np.float32)
    factors[NAN_SCALE] = np.nan
    return torch.from_numpy(pairs), torch.from_numpy(factors)


_PAIRS, _FACTORS = _tables()


@cache
def _tables_there(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _PAIRS.to(device, dtype), _FACTORS.to(device, dtype)


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 blocks [N, n, 16] and scales [N, n] -> dtype [N, 32 n]."""
    pairs, factors = _tables_there(blocks.device, dtype)
    # int32 indices: index_select takes them, and int64 would be eight bytes for each of half a byte.
    values = pairs.index_select(0, blocks.reshape(-1).int()).view(-1, BLOCK_SIZE)
    values *= factors.index_select(0, scales.reshape(-1).int())[:, None]
    return values.view(blocks.shape[0], -1)


def round_mxfp4(values: Tensor) -> Tensor:
    """float32 [..., 32 n] -> what `decode_mxfp4(*quantize_mxfp4(values))` gives; finite input only."""
    grouped = values.float().view(*values.shape[:-1], -1, BLOCK_SIZE)
    largest = grouped.abs().amax(dim=-1, keepdim=True)
    exponent = (torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT).clamp(-SCALE_BIAS, SCALE_BIAS)
    exponent = (exponent + (torch.ldexp(largest, -exponent) > 7).int()).clamp(max=LARGEST_USEFUL_EXPONENT)
    small = torch.ldexp(grouped, -exponent)
    step = torch.frexp(small).exponent.sub_(1).clamp_(_SMALLEST_EXPONENT, _LARGEST_EXPONENT).sub_(1)
    # torch.round goes to even, which is an even fraction bit.
    rounded = torch.ldexp(torch.round(torch.ldexp(small, -step)), step).clamp_(-6, 6)
    return torch.ldexp(rounded, exponent).flatten(-2)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, axis: int) -> Tensor:
        return round_mxfp4(weight.movedim(axis, -1).contiguous()).movedim(-1, axis).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_quantize_mxfp4(weight: Tensor, axis: int = -1) -> Tensor:
    """weight, each 32 neighbors along `axis` rounded as MXFP4 stores them; the gradient passes unchanged.

    Hugging Face's float experts [E, inputs, outputs] have their blocks along axis 1.
    """
    rounded: Tensor = _FakeQuantize.apply(weight, axis)  # type: ignore[no-untyped-call]
    return rounded
