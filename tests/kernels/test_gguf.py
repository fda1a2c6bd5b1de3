"""Q8_0 rows as int8 panels: the file's integers under the file's scales."""

from __future__ import annotations

import numpy as np
import pytest

from harmonium.checkpoint.bfloat16 import decode_bfloat16, encode_bfloat16
from harmonium.kernels.gguf import panels_of_q8
from harmonium.kernels.matmul import linear_int8, quantize_weight
from harmonium.kernels.reference_matmul import quantize_activations


def q8_rows(scale_NB: np.ndarray, q_NK: np.ndarray) -> np.ndarray:
    """Rows [N, 34 n] of float16 scales and int8 numbers."""
    blocks = q_NK.reshape(*scale_NB.shape, 32).view(np.uint8)
    scales = np.ascontiguousarray(scale_NB.astype("<f2")[..., None]).view(np.uint8)
    return np.concatenate((scales, blocks), axis=-1).reshape(len(q_NK), -1)


def numbers(seed: int, num_outputs: int, num_inputs: int) -> np.ndarray:
    """int8 from -127 to 127, with 127 in every block."""
    q = np.random.default_rng(seed).integers(-127, 128, (num_outputs, num_inputs), dtype=np.int8)
    q[:, ::32] = 127
    return q


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 32), (15, 96), (16, 64), (33, 160), (80, 2880)])
def test_panels_hold_the_files_numbers(isa: str, num_outputs: int, num_inputs: int) -> None:
    """Scales that are powers of two make weights that bf16 holds, whose own panels must be the same bytes."""
    q = numbers(0, num_outputs, num_inputs)
    exponents = np.random.default_rng(1).integers(-14, 4, (num_outputs, num_inputs // 32))
    scale = np.ldexp(np.float32(1), exponents).astype(np.float32)
    weight = q.reshape(*scale.shape, 32).astype(np.float32) * scale[..., None]
    expected = quantize_weight(encode_bfloat16(weight.reshape(q.shape)))
    got = panels_of_q8(q8_rows(scale, q))
    assert (got.num_outputs, got.num_inputs) == (num_outputs, num_inputs)
    assert np.array_equal(got.panels, expected.panels)


@pytest.mark.parametrize("num_tokens", [1, 3, 9])
def test_products_are_those_of_the_files_numbers(isa: str, num_tokens: int) -> None:
    """-128 is a number too, though no converter writes it; scales are rounded to bf16, negative ones kept."""
    q = np.random.default_rng(2).integers(-128, 128, (40, 96), dtype=np.int8)
    scale = np.random.default_rng(3).normal(0, 0.01, (40, 3)).astype("<f2").astype(np.float32)
    scale[0], scale[1] = 0, 6e-8  # 6e-8 is a subnormal float16
    x = np.random.default_rng(4).normal(size=(num_tokens, 96)).astype(np.float32)
    out = np.empty((num_tokens, 40), np.float32)
    linear_int8(x, panels_of_q8(q8_rows(scale, q)), None, out)
    rounded = decode_bfloat16(encode_bfloat16(scale.astype("<f2").astype(np.float32))).astype(np.float64)
    weight = q.reshape(40, 3, 32) * rounded[..., None]
    q_TK, scale_TB = quantize_activations(x)
    exact = (q_TK.reshape(-1, 3, 32) * scale_TB.astype(np.float64)[..., None]).reshape(-1, 96)
    np.testing.assert_allclose(out, exact @ weight.reshape(40, 96).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
def test_a_scale_that_is_no_number_spoils_its_row_alone(isa: str, bits: int) -> None:
    rows = q8_rows(np.full((20, 2), 0.5), numbers(5, 20, 64))
    rows[7, 34:36] = np.array([bits], "<u2").view(np.uint8)
    out = np.empty((2, 20), np.float32)
    linear_int8(np.ones((2, 64), np.float32), panels_of_q8(rows), None, out)
    assert np.isnan(out[:, 7]).all() and np.isfinite(np.delete(out, 7, axis=1)).all()


def test_rows_of_a_wrong_length_are_named() -> None:
    with pytest.raises(ValueError, match="no multiple of 34"):
        panels_of_q8(np.zeros((4, 35), np.uint8))
