"""MXFP4: 32 numbers of 4 bits that share a scale of 8 bits. The format's specification, in NumPy.

A block is 16 bytes and one scale byte. Byte b holds numbers 2b (low nibble) and 2b + 1 (high nibble). A
nibble is E2M1: one sign bit, two exponent bits, one fraction bit; its values are those of FP4_VALUES. The
scale byte is E8M0: it stands for 2 ** (byte - 127), and 255 stands for NaN, which makes the block NaN.

Source: OCP Microscaling Formats (MX) Specification v1.0 (MXFP4, E2M1, E8M0, conversion from scalars); the
order of the nibbles is openai/gpt-oss:gpt_oss/torch/weights.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from harmonium.errors import CheckpointError

BLOCK_SIZE = 32
"""Numbers in a block."""

BLOCK_BYTES = 16
"""Bytes of a block's numbers, without its scale."""

SCALE_BIAS = 127

NAN_SCALE = 255

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The number that each nibble stands for."""

_LARGEST_EXPONENT = 2
"""Of E2M1: its largest number is 1.5 * 2 ** 2."""

LARGEST_USEFUL_EXPONENT = 125
"""Of a block of float32 numbers; 4 times the next scale overflows."""

_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=np.float32)
"""Halfway between neighbors of FP4_VALUES[:8]."""


def decode_mxfp4(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """blocks [..., n, 16] and scales [..., n] -> float32 [..., 32 n].

    Exact but for scales of 253 and 254, where the larger numbers overflow float32 to infinity.
    Raises CheckpointError when the shapes do not belong together.
    """
    if blocks.ndim < 2 or blocks.shape[-1] != BLOCK_BYTES or blocks.shape[:-1] != scales.shape:
        raise CheckpointError(
            f"MXFP4 blocks have shape {list(blocks.shape)} and scales {list(scales.shape)}; "
            f"expected [..., n, {BLOCK_BYTES}] and [..., n]"
        )
    nibbles = np.stack((blocks & 0x0F, blocks >> 4), axis=-1)
    values = np.array(FP4_VALUES, dtype=np.float32)[nibbles].reshape(*blocks.shape[:-1], BLOCK_SIZE)
    with np.errstate(over="ignore"):
        values = np.ldexp(values, scales.astype(np.int32)[..., None] - SCALE_BIAS)
    values[scales == NAN_SCALE] = np.nan
    return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK_SIZE)


def encode_mxfp4(
    values: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """float32 [..., 32 n] -> blocks [..., n, 16] and scales [..., n].

    The scale is the power of two of the block's largest number, less two; numbers are rounded to the nearest,
    ties to even, and saturate at 6 times the scale. A block with a NaN or an infinity gets scale 255.
    Raises CheckpointError when the last axis is not a whole number of blocks.

    Source: OCP MX v1.0, conversion from scalars; how to round and what to do with NaN are left open there.
    """
    return _encode(values, largest_kept=8.0)


def quantize_mxfp4(
    values: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """As `encode_mxfp4`, for weights: a block whose largest number is over 7 scales gets twice the scale.

    The conversion of the specification makes 6 of a 7.99, so a block that was 8 before a small change loses a
    quarter of its largest number; here 7 is the border at which both scales are wrong by the same.
    """
    return _encode(values, largest_kept=7.0)


def _encode(
    values: npt.NDArray[np.float32], largest_kept: float
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """largest_kept: numbers above it, in scales, double the scale; 8 is never passed."""
    if values.ndim < 1 or values.shape[-1] % BLOCK_SIZE:
        raise CheckpointError(
            f"an array of shape {list(values.shape)} has no MXFP4 form; expected [..., {BLOCK_SIZE} n]"
        )
    grouped = values.astype(np.float32).reshape(
        *values.shape[:-1], values.shape[-1] // BLOCK_SIZE, BLOCK_SIZE
    )
    magnitude = np.abs(grouped)
    is_finite = np.isfinite(magnitude).all(axis=-1)
    magnitude[~is_finite] = 0.0
    largest = magnitude.max(axis=-1)
    # frexp gives 0.5 <= fraction < 1, so floor(log2(x)) is its exponent less one, exactly.
    exponent = np.frexp(largest)[1].astype(np.int32) - 1 - _LARGEST_EXPONENT
    exponent = np.clip(np.where(largest == 0, -SCALE_BIAS, exponent), -SCALE_BIAS, SCALE_BIAS)
    exponent += (np.ldexp(largest, -exponent) > largest_kept) & (exponent < LARGEST_USEFUL_EXPONENT)
    index = _nearest_even_index(np.ldexp(magnitude, -exponent[..., None]))
    sign = (np.signbit(grouped) & np.expand_dims(is_finite, -1)).astype(np.uint8)
    nibbles = index | sign << np.uint8(3)
    blocks: npt.NDArray[np.uint8] = nibbles[..., 0::2] | nibbles[..., 1::2] << np.uint8(4)
    scales: npt.NDArray[np.uint8] = np.where(is_finite, exponent + SCALE_BIAS, NAN_SCALE).astype(np.uint8)
    return blocks, scales


def _nearest_even_index(magnitude: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Index into FP4_VALUES[:8] of the nearest number; an even index (even fraction bit) wins a tie."""
    below = np.searchsorted(_MIDPOINTS, magnitude, side="left")
    above = np.searchsorted(_MIDPOINTS, magnitude, side="right")
    return np.where(below % 2 == 0, below, above).astype(np.uint8)
