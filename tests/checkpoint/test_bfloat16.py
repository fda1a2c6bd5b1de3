"""bfloat16 bits: decoding is exact, encoding rounds to the nearest, ties to even."""

from __future__ import annotations

import numpy as np

from harmonium.checkpoint.bfloat16 import decode_bfloat16, encode_bfloat16


def test_every_bit_pattern_survives_a_round_trip() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    values = decode_bfloat16(bits)
    again = encode_bfloat16(values)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(again[~is_nan], bits[~is_nan])
    # A NaN stays a NaN of the same sign.
    assert np.isnan(decode_bfloat16(again[is_nan])).all()
    np.testing.assert_array_equal(again[is_nan] >> 15, bits[is_nan] >> 15)


def test_rounding_is_to_the_nearest_and_ties_go_to_even() -> None:
    step = 2.0**-7  # between neighbors from 1 to 2
    values = np.array(
        [1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, 1 + 0.49 * step, -1 - step / 2, 3.4e38, np.inf],
        np.float32,
    )
    expected = [1.0, 1 + 2 * step, 1 + step, 1.0, -1.0, np.inf, np.inf]
    assert decode_bfloat16(encode_bfloat16(values)).tolist() == expected


def test_turned_and_single_arrays_keep_their_shape() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(decode_bfloat16(encode_bfloat16(values)), values)
    assert encode_bfloat16(np.float32(1.0).reshape(())).shape == ()
