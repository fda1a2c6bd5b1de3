"""MXFP4: the format's numbers, and an encoder that is exact where it can be and nearest where it cannot."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.checkpoint.mxfp4 import FP4_VALUES, NAN_SCALE, decode_mxfp4, encode_mxfp4, quantize_mxfp4
from harmonium.errors import CheckpointError


def test_every_nibble_at_every_place_decodes_to_its_number() -> None:
    nibbles = np.arange(32, dtype=np.uint8).reshape(1, 32) % 16
    blocks: npt.NDArray[np.uint8] = nibbles[:, 0::2] | nibbles[:, 1::2] << np.uint8(4)
    for scale in (0, 1, 100, 126, 127, 128, 200, 251):
        values = decode_mxfp4(blocks[None], np.full((1, 1), scale, np.uint8))
        expected = [FP4_VALUES[n % 16] * 2.0 ** (scale - 127) for n in range(32)]
        assert values.shape == (1, 32)
        assert values[0].tolist() == expected
        assert np.signbit(values[0, 8])  # minus zero stays


def test_low_nibble_comes_first() -> None:
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, 0] = 0x52  # low nibble 2 is 1.0, high nibble 5 is 3.0
    assert decode_mxfp4(blocks, np.full((1, 1), 128, np.uint8))[0, :3].tolist() == [2.0, 6.0, 0.0]


def test_scale_255_makes_its_block_nan_and_no_other() -> None:
    blocks = np.full((1, 2, 16), 0x22, np.uint8)
    values = decode_mxfp4(blocks, np.array([[NAN_SCALE, 127]], np.uint8))
    assert np.isnan(values[0, :32]).all()
    assert (values[0, 32:] == 1).all()


def test_the_largest_scales_overflow_to_infinity_without_a_warning() -> None:
    values = decode_mxfp4(np.full((1, 1, 16), 0x72, np.uint8), np.full((1, 1), 254, np.uint8))
    assert values[0, 0] == 2.0**127
    assert np.isinf(values[0, 1])


def test_what_the_format_can_say_survives_encoding() -> None:
    generator = np.random.default_rng(0)
    nibbles = generator.integers(0, 16, (3, 5, 32)).astype(np.uint8)
    nibbles[..., 0] = 7  # a 6 in every block, so that its scale is the one that encode picks
    blocks: npt.NDArray[np.uint8] = nibbles[..., 0::2] | nibbles[..., 1::2] << np.uint8(4)
    scales = generator.integers(0, 253, (3, 5)).astype(np.uint8)
    again_blocks, again_scales = encode_mxfp4(decode_mxfp4(blocks, scales))
    np.testing.assert_array_equal(again_blocks, blocks)
    np.testing.assert_array_equal(again_scales, scales)


def test_encoding_picks_the_nearest_number_ties_to_even() -> None:
    generator = np.random.default_rng(1)
    values = generator.uniform(-6, 6, (64, 32)).astype(np.float32)
    values[:, 0] = 6.0
    values[0, 1:8] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    decoded = decode_mxfp4(*encode_mxfp4(values))
    grid = np.array(FP4_VALUES[:8] + FP4_VALUES[9:], np.float64)
    distance = np.abs(values[..., None].astype(np.float64) - grid).min(-1)
    np.testing.assert_array_equal(np.abs(values.astype(np.float64) - decoded), distance)
    assert decoded[0, 1:8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_numbers_above_six_times_the_scale_saturate() -> None:
    values = np.zeros(32, np.float32)
    values[:3] = [7.9, -7.9, 4.0]
    assert decode_mxfp4(*encode_mxfp4(values))[:3].tolist() == [6.0, -6.0, 4.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_no_finite_form_becomes_nan(bad: float) -> None:
    values = np.ones((1, 64), np.float32)
    values[0, 5] = bad
    blocks, scales = encode_mxfp4(values)
    assert scales.tolist() == [[NAN_SCALE, 125]]
    decoded = decode_mxfp4(blocks, scales)
    assert np.isnan(decoded[0, :32]).all()
    assert (decoded[0, 32:] == 1).all()


def test_zeros_and_the_smallest_numbers_stay_finite() -> None:
    values = np.zeros((2, 32), np.float32)
    values[1, 0] = np.float32(2.0**-149)
    blocks, scales = encode_mxfp4(values)
    assert scales.tolist() == [[0], [0]]
    assert not decode_mxfp4(blocks, scales).any()


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\[2, 15\]"):
        decode_mxfp4(np.zeros((2, 15), np.uint8), np.zeros(2, np.uint8))
    with pytest.raises(CheckpointError, match=r"scales \[3\]"):
        decode_mxfp4(np.zeros((2, 16), np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(CheckpointError, match=r"\[2, 33\]"):
        encode_mxfp4(np.zeros((2, 33), np.float32))


def test_a_weight_that_falls_a_little_below_a_power_of_two_keeps_its_size() -> None:
    block = np.full(32, 1.0, np.float32)
    block[0] = 7.99
    assert decode_mxfp4(*encode_mxfp4(block))[0] == 6.0
    assert decode_mxfp4(*quantize_mxfp4(block))[0] == 8.0
    block[0] = 7.0  # as far from 6 as from 8: the finer scale is better for the others
    assert decode_mxfp4(*quantize_mxfp4(block))[0] == 6.0


def test_quantized_weights_are_never_further_off_at_their_largest_and_survive_a_second_time() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((500, 64)) * 10.0 ** rng.integers(-30, 30, (500, 1))).astype(np.float32)
    once = decode_mxfp4(*quantize_mxfp4(values))
    np.testing.assert_array_equal(decode_mxfp4(*quantize_mxfp4(once)), once)
    error = np.abs(once - values).reshape(-1, 32)
    plain_error = np.abs(decode_mxfp4(*encode_mxfp4(values)) - values).reshape(-1, 32)
    largest = np.abs(values).reshape(-1, 32).argmax(axis=1)[:, None]
    assert (np.take_along_axis(error, largest, 1) <= np.take_along_axis(plain_error, largest, 1)).all()
    relative, plain_relative = (
        np.square(each / np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)).mean()
        for each in (error, plain_error)
    )
    assert relative < plain_relative


def test_the_largest_float_is_quantized_without_overflow() -> None:
    values = decode_mxfp4(*quantize_mxfp4(np.full(32, 3.4e38, np.float32)))
    assert np.isfinite(values).all()
