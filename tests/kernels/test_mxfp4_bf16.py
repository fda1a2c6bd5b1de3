"""MXFP4 by bf16 activations: weights are decoded exactly, and a token's bits depend on the token alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from harmonium.kernels import matmul, reference_matmul, runtime
from tests.kernels.test_matmul import Bytes, Floats, assert_product, mxfp4, normal

MOST_TOKENS = 70
WIDTHS = [32, 64, 96, 128, 160, 224, 480]
"""Inputs in runs of four blocks, and one, two or three blocks left."""


def product(x: Floats, blocks: Bytes, scales: Bytes) -> Floats:
    out = np.full((len(x), len(blocks)), np.nan, np.float32)
    matmul.matmul_mxfp4(x, blocks, scales, None, out, "bf16")
    return out


@pytest.mark.parametrize("num_inputs", WIDTHS)
def test_a_token_has_the_same_bits_in_every_batch(isa: str, num_inputs: int) -> None:
    x, weight = normal(1, MOST_TOKENS, num_inputs), mxfp4(2, 45, num_inputs)
    whole = product(x, *weight)
    expected = np.zeros_like(whole)
    reference_matmul.matmul_mxfp4(x, *weight, None, expected, "bf16")
    assert_product(whole, expected, x, reference_matmul.decode_mxfp4(*weight))
    for count in range(1, MOST_TOKENS + 1):
        first = (7 * count) % (MOST_TOKENS - count + 1)
        np.testing.assert_array_equal(
            product(x[first : first + count], *weight), whole[first : first + count]
        )


@pytest.mark.parametrize("num_outputs", [1, 3, 4, 9, 31, 33, 100])
def test_an_output_has_the_same_bits_with_any_others_and_any_threads(isa: str, num_outputs: int) -> None:
    """Rows are taken several at a time, which ones depends on how many there are."""
    x, (blocks, scales) = normal(1, 6, 160), mxfp4(2, 100, 160)
    whole = product(x, blocks, scales)
    for threads in (1, 2, 3):
        runtime.configure(isa, threads)
        for count in (1, 2, 6):
            part = product(x[:count], blocks[:num_outputs], scales[:num_outputs])
            np.testing.assert_array_equal(part, whole[:count, :num_outputs])


def scales_near_the_ends() -> Iterator[tuple[int, int]]:
    """Scale bytes and the least magnitude (of nibbles 1 to 7) whose product with them is no denormal bf16."""
    for scale in (1, 2, 3, 126, 127, 128, 129, 250, 251, 252, 253):
        yield scale, 2 if scale == 1 else 1
    yield 0, 4
    yield 254, 1  # up to 1.5 below


@pytest.mark.parametrize(("scale", "least"), list(scales_near_the_ends()))
@pytest.mark.parametrize("num_inputs", [32, 96, 224])
def test_every_scale_is_decoded_exactly(isa: str, scale: int, least: int, num_inputs: int) -> None:
    """One input at a time is a power of two: the output is the weight times it, with no rounding anywhere."""
    most = {254: 3, 253: 5}.get(scale, 7)
    rng = np.random.default_rng(scale)
    nibbles = (
        rng.integers(least, most + 1, (5, num_inputs), np.uint8) | rng.integers(0, 2, (5, num_inputs)) << 3
    )
    blocks = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).astype(np.uint8).reshape(5, -1, 16)
    scales = np.full((5, num_inputs // 32), scale, np.uint8)
    weight = reference_matmul.decode_mxfp4(blocks, scales)
    power = np.float32(2.0**40 if scale < 64 else 1.0 if scale < 192 else 2.0**-40)
    x = np.eye(num_inputs, dtype=np.float32) * power
    for rows in (x, x[:3]):
        np.testing.assert_array_equal(product(rows, blocks, scales), weight.T[: len(rows)] * power)


@pytest.mark.parametrize("unusual", [0, 1, 128, 200, 255])
@pytest.mark.parametrize("num_tokens", [1, 3, 9])
def test_an_unusual_scale_changes_no_other_output(isa: str, unusual: int, num_tokens: int) -> None:
    """The tile that has it is decoded another way: the same bits in its other rows, and NaN where 255 is."""
    x, (blocks, scales) = normal(1, num_tokens, 224), mxfp4(2, 40, 224)
    before = product(x, blocks, scales)
    scales[7, 3] = unusual
    after = product(x, blocks, scales)
    np.testing.assert_array_equal(np.delete(after, 7, axis=1), np.delete(before, 7, axis=1))
    assert np.isnan(after[:, 7]).all() if unusual == 255 else np.isfinite(after[:, 7]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activation_that_is_not_finite_spoils_its_token_alone(isa: str, bad: float) -> None:
    """A weight of zero times infinity is NaN, whichever zero the weight is."""
    x, (blocks, scales) = normal(1, 9, 96), mxfp4(2, 40, 96)
    blocks[3], blocks[4] = 0, 0x88
    before = product(x, blocks, scales)
    x[4, 50] = bad
    after = product(x, blocks, scales)
    np.testing.assert_array_equal(np.delete(after, 4, axis=0), np.delete(before, 4, axis=0))
    assert not np.isfinite(after[4]).any()
    assert np.isnan(after[4, 3:5]).all()
