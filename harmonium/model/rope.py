"""Rotary embedding tables: YaRN's frequencies, and the cosines and sines of a step's positions.

Source: YaRN, arXiv 2309.00071, section 3; the released models' use of it: openai/gpt-oss
gpt_oss/torch/model.py (RotaryEmbedding) and Transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.model_config import RopeConfig

FloatArray = npt.NDArray[np.float32]


def attention_factor(rope: RopeConfig) -> float:
    """YaRN's temperature: cosines and sines are multiplied by it. 1.0 for plain RoPE."""
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0


def correction_range(rope: RopeConfig, head_size: int) -> tuple[float, float]:
    """(low, high): frequencies up to index low stay, those from index high on are divided by the factor.

    The index is where a frequency turns beta_fast (beta_slow) times within the original context. The released
    config says truncate false: the bounds are not rounded to whole indices.
    """

    def index_of(rotations: float) -> float:
        # Solves original_context * theta^(-2i/K) = 2 pi rotations for i.
        turns = rope.original_context / (rotations * 2 * math.pi)
        return head_size * math.log(turns) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_size - 1)


def inverse_frequencies(rope: RopeConfig, head_size: int) -> FloatArray:
    """Radians per position, [K/2].

    Every step is rounded to float32, as in the implementations the models were trained and are run with: at
    position 100,000 an angle differs in its third decimal when the frequency's last bit does.
    """
    exponent = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    wavelength = np.power(float(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    plain: FloatArray = np.float32(1.0) / wavelength
    if rope.factor <= 1.0:
        return plain
    stretched = np.float32(1.0) / (np.float32(rope.factor) * wavelength)
    low, high = correction_range(rope, head_size)
    if low == high:
        high += 0.001  # a ramp of no length would divide by zero
    index = np.arange(head_size // 2, dtype=np.float32)
    keep = np.float32(1.0) - np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(stretched * (np.float32(1.0) - keep) + plain * keep, dtype=np.float32)


def rope_tables(
    position_T: npt.NDArray[np.int32], inverse_frequency: FloatArray, factor: float
) -> tuple[FloatArray, FloatArray]:
    """(cos, sin), float32 [T, K/2], both multiplied by the attention factor.

    The angle is a float32 product, as in Transformers: its rounding (2e-4 at position 5,000) is kept.
    """
    angle = position_T.astype(np.float32)[:, None] * inverse_frequency
    scale = np.float32(factor)
    return np.cos(angle) * scale, np.sin(angle) * scale
