"""Experts in several calls, from wherever they lie: the bits of one call over arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.kernels.matmul import moe_mxfp4
from harmonium.kernels.streamed import PLACE_COLUMNS, add_moe_parts, moe_parts
from tests.kernels.test_matmul import ALPHA, LIMIT, Layer, normal, routes


def scattered(layer: Layer, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """A pool that holds the experts' parts in random order, with random bytes between, and their places."""
    rng = np.random.default_rng(seed)
    matrices = (*layer.gate_up, *layer.down)
    num_experts = len(matrices[0])
    place = np.full((num_experts, PLACE_COLUMNS), -1, np.int64)
    pieces: list[npt.NDArray[np.uint8]] = []
    end = 0
    for index in rng.permutation(num_experts * PLACE_COLUMNS):
        expert, column = divmod(int(index), PLACE_COLUMNS)
        gap = rng.integers(0, 256, int(rng.integers(1, 40)), np.uint8)
        piece = matrices[column][expert].reshape(-1)
        place[expert, column] = end + len(gap)
        pieces += [gap, piece]
        end += len(gap) + len(piece)
    return np.concatenate(pieces), place


def in_groups(
    x: Any, route: Any, layer: Layer, groups: list[list[int]], out: Any, activations: Any, adapters: Any = ()
) -> None:
    pool, place = scattered(layer, 9)
    ids, weights = route
    parts = np.full((*ids.shape, x.shape[1]), np.nan, np.float32)
    for group in groups:
        chosen = np.where(np.isin(ids, group), ids, np.int32(-1))
        biases = layer.gate_up_bias, layer.down_bias
        moe_parts(x, chosen, weights, pool, place, None, *biases, parts, LIMIT, ALPHA, activations, *adapters)
    add_moe_parts(parts, out)


@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 3, 9, 61])
@pytest.mark.parametrize("groups", [[[0, 1, 2, 3, 4]], [[3], [0, 4], [2], [1]], [[4], [3], [2], [1], [0]]])
def test_groups_give_the_bits_of_one_call(
    isa: str, groups: list[list[int]], num_tokens: int, activations: Any
) -> None:
    layer = Layer.random(1, 5, 96, 64)
    x, route = normal(5, num_tokens, 96), routes(6, num_tokens, 5, 2)
    out, expected = normal(7, num_tokens, 96), normal(7, num_tokens, 96)
    moe_mxfp4(x, *route, *layer.mxfp4, expected, LIMIT, ALPHA, activations)
    in_groups(x, route, layer, groups, out, activations)
    np.testing.assert_array_equal(out, expected)


def test_adapters_follow_the_experts_numbers(isa: str) -> None:
    layer, num_tokens = Layer.random(1, 5, 96, 64), 13
    x, route = normal(5, num_tokens, 96), routes(6, num_tokens, 5, 2)
    up = normal(1, 5, 3, 96), normal(2, 5, 3, 128), 0.5
    down = normal(3, 5, 2, 64), normal(4, 5, 2, 96), 2.0
    adapter_T = (np.arange(num_tokens) % 3 - 1).astype(np.int32)
    adapters = [(up, down), (None, down)], adapter_T
    out, expected = normal(7, num_tokens, 96), normal(7, num_tokens, 96)
    moe_mxfp4(x, *route, *layer.mxfp4, expected, LIMIT, ALPHA, "int8", *adapters)
    in_groups(x, route, layer, [[2, 0], [4], [1, 3]], out, "int8", adapters)
    np.testing.assert_array_equal(out, expected)


def test_wrong_places_and_numbers_are_named() -> None:
    layer = Layer.random(1, 3, 64, 32)
    pool, place = scattered(layer, 1)
    x, route = normal(1, 2, 64), (np.array([[0], [2]], np.int32), np.ones((2, 1), np.float32))
    parts = np.zeros((2, 1, 64), np.float32)

    def call(place: Any, ids: Any = route[0]) -> None:
        biases = layer.gate_up_bias, layer.down_bias
        moe_parts(x, ids, route[1], pool, place, None, *biases, parts, LIMIT, ALPHA)

    absent, outside = place.copy(), place.copy()
    absent[1], outside[2, 3] = -1, len(pool) - 5
    call(absent)  # expert 1 is not asked for
    with pytest.raises(ValueError, match=r"place of expert 2's down is .*must lie within the pool of"):
        call(outside)
    with pytest.raises(ValueError, match="place of expert 1's gate_up is -1; its 2048 bytes must lie"):
        call(absent, np.array([[0], [1]], np.int32))
    with pytest.raises(IndexError, match="expert_id holds 3 for token 1; expected at most 2"):
        call(place, np.array([[0], [3]], np.int32))
    with pytest.raises(ValueError, match="place has size 3 along axis 1; expected 4"):
        call(np.ascontiguousarray(place[:, :3]))
