"""Packed tiles: the same matrices in the products' order, and the same bits out of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.kernels import matmul as native
from harmonium.kernels import reference_matmul as specification
from tests.kernels.test_matmul import ALPHA, LIMIT, Layer, assert_experts, mxfp4, normal, routes

Bytes = npt.NDArray[np.uint8]


def packed(matrix: tuple[Bytes, Bytes]) -> Bytes:
    """All experts of blocks [E, N, B, 16] and scales [E, N, B], packed natively."""
    blocks, scales = matrix
    num_experts, num_outputs, num_blocks, _ = blocks.shape
    tiles = np.full((num_experts, *native.packed_shape(num_outputs, 32 * num_blocks)), 0xAA, np.uint8)
    for expert in range(num_experts):
        native.pack_mxfp4(blocks[expert], scales[expert], tiles[expert])
    return tiles


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 32), (31, 96), (32, 64), (33, 160), (80, 288)])
def test_packing_is_the_specification(num_outputs: int, num_inputs: int) -> None:
    blocks, scales = mxfp4(1, 1, num_outputs, num_inputs)
    expected = np.full(native.packed_shape(num_outputs, num_inputs), 0xAA, np.uint8)
    specification.pack_mxfp4(blocks[0], scales[0], expected)
    assert (packed((blocks, scales))[0] == expected).all()
    back_blocks, back_scales = specification._unpack(expected[None], num_outputs, num_inputs)
    assert (back_blocks == blocks).all() and (back_scales == scales).all()


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 8, 9, 61])
@pytest.mark.parametrize(("hidden", "size"), [(96, 64), (32, 160), (160, 32)])
def test_packed_experts_give_the_bits_of_the_files_layout(
    isa: str, num_tokens: int, hidden: int, size: int
) -> None:
    layer = Layer.random(1, 5, hidden, size)
    x, route = normal(5, num_tokens, hidden), routes(6, num_tokens, 5, 2)
    out, expected = normal(7, num_tokens, hidden), normal(7, num_tokens, hidden)
    native.moe_mxfp4(x, *route, *layer.mxfp4, expected, LIMIT, ALPHA)
    arrays = packed(layer.gate_up), layer.gate_up_bias, packed(layer.down), layer.down_bias
    native.moe_packed(x, *route, *arrays, out, LIMIT, ALPHA)
    assert (out == expected).all()
    reference = normal(7, num_tokens, hidden)
    specification.moe_packed(x, *route, *arrays, reference, LIMIT, ALPHA)
    assert_experts(out, reference)


def test_scales_at_both_ends_and_nan_are_kept(isa: str) -> None:
    """0 is a denormal, 255 NaN; a NaN scale spoils the outputs of its row alone."""
    layer = Layer.random(3, 1, 64, 32)
    for scales in (layer.gate_up[1], layer.down[1]):
        scales[0, ::7] = 0
    layer.down[1][0, 5, 0] = 255
    x, one = normal(2, 12, 64), (np.zeros((12, 1), np.int32), np.ones((12, 1), np.float32))
    arrays = packed(layer.gate_up), layer.gate_up_bias, packed(layer.down), layer.down_bias
    for num_tokens in (1, 12):
        out, expected = np.zeros((2, num_tokens, 64), np.float32)
        rows = x[:num_tokens], one[0][:num_tokens], one[1][:num_tokens]
        native.moe_packed(*rows, *arrays, out, LIMIT, ALPHA)
        native.moe_mxfp4(*rows, *layer.mxfp4, expected, LIMIT, ALPHA)
        assert np.isnan(out[:, 5]).all() and np.isfinite(np.delete(out, 5, axis=1)).all()
        np.testing.assert_array_equal(out, expected)


def test_wrong_arrays_are_named() -> None:
    layer = Layer.random(1, 3, 64, 32)
    arrays = packed(layer.gate_up), layer.gate_up_bias, packed(layer.down), layer.down_bias
    x, route, out = normal(1, 2, 64), routes(2, 2, 3, 1), np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="down_packed has size 2 along axis 0; expected 3"):
        native.moe_packed(x, *route, *arrays[:2], arrays[2][:2], arrays[3], out, LIMIT, ALPHA)
    with pytest.raises(ValueError, match=r"gate_up_packed has size .* along axis 2; expected"):
        short = np.ascontiguousarray(arrays[0][:, :, :-64])
        native.moe_packed(x, *route, short, *arrays[1:], out, LIMIT, ALPHA)
    with pytest.raises(ValueError, match="packed has size 1 along axis 0; expected 2"):
        native.pack_mxfp4(
            layer.gate_up[0][0], layer.gate_up[1][0], np.zeros((1, arrays[0].shape[2]), np.uint8)
        )
