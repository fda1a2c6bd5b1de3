import math
from dataclasses import replace

import numpy as np
import pytest

from harmonium.model.rope import attention_factor, correction_range, inverse_frequencies, rope_tables
from tests.model.tiny_models import ROPE


def test_released_config_has_the_published_correction_range_and_attention_factor() -> None:
    low, high = correction_range(ROPE, head_size=64)
    assert low == pytest.approx(8.092779, abs=5e-7)
    assert high == pytest.approx(17.398025, abs=5e-7)
    assert attention_factor(ROPE) == pytest.approx(1.346574, abs=5e-7)


def test_truncate_rounds_the_correction_range_outwards() -> None:
    assert correction_range(replace(ROPE, truncate=True), head_size=64) == (8, 18)


def test_correction_range_stays_inside_the_head() -> None:
    low, high = correction_range(replace(ROPE, original_context=64), head_size=16)
    assert low == 0
    assert high <= 15


def test_fast_frequencies_stay_and_slow_ones_are_divided_by_the_factor() -> None:
    plain = inverse_frequencies(replace(ROPE, factor=1.0), head_size=64)
    yarn = inverse_frequencies(ROPE, head_size=64)
    np.testing.assert_array_equal(yarn[:9], plain[:9])
    np.testing.assert_allclose(yarn[18:], plain[18:] / 32, rtol=1e-6)
    assert np.all(yarn[9:18] < plain[9:18]) and np.all(yarn[9:18] > plain[9:18] / 32)


def test_factor_one_is_plain_rope() -> None:
    rope = replace(ROPE, factor=1.0)
    expected = 150000.0 ** (-np.arange(0, 48, 2) / 48)
    np.testing.assert_allclose(inverse_frequencies(rope, head_size=48), expected, rtol=3e-7)
    assert attention_factor(rope) == 1.0


def test_ramp_of_no_length_keeps_frequencies_finite() -> None:
    rope = replace(ROPE, beta_fast=1.0, beta_slow=1.0)
    low, high = correction_range(rope, head_size=64)
    assert low == high
    assert np.all(np.isfinite(inverse_frequencies(rope, head_size=64)))


def test_tables_are_the_scaled_cosine_and_sine_of_a_float32_angle() -> None:
    position_T = np.array([0, 1, 4095, 5000, 131071], dtype=np.int32)
    frequency = inverse_frequencies(ROPE, head_size=64)
    cos, sin = rope_tables(position_T, frequency, attention_factor(ROPE))
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (5, 32)
    for row, position in enumerate(position_T):
        for column in range(32):
            angle = float(np.float32(position) * frequency[column])
            assert cos[row, column] == pytest.approx(1.3465736 * math.cos(angle), abs=3e-7)
            assert sin[row, column] == pytest.approx(1.3465736 * math.sin(angle), abs=3e-7)
