"""The experts' products from MXFP4 as the files hold it, in Triton: on CUDA or in Triton's interpreter.

Nothing is unpacked in memory: a block's 16 bytes and scale become 32 numbers in registers, exactly.

- Few tokens: a program computes some outputs of one expert for one token, as a matrix times a vector. All it
  must do is read those rows of the expert once: memory bounds it.
- More tokens: pairs are grouped by expert, and a program multiplies a tile of them in the model's dtype (bf16
  on CUDA) with sums in float32. Which tile is which expert's is computed on the device: nothing waits for it.

Two launches each: gate and up with the clamped SwiGLU between them (they alternate, so a unit's two rows are
neighbors), then down, weighted by the router. No atomic additions: the same input gives the same bits.

Dimension letters: T tokens, D model width, A active experts, E experts, F expert width, Y pairs of a token
and one of its experts, X tiles, M pairs of a tile, N outputs, K inputs, B blocks of 32 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmonium.checkpoint.mxfp4 import BLOCK_BYTES, BLOCK_SIZE, NAN_SCALE
from harmonium.model.torch_experts import PARTS, Experts
from harmonium.model.torch_triton import product_type

MAX_VECTOR_TOKENS = 4
"""Most tokens of a step whose products are matrix times vector. Not tuned."""

VECTOR_OUTPUTS, VECTOR_BLOCKS = 16, 8
"""Of a program: rows, and blocks of each that it reads at a time, 128 bytes side by side. Not tuned."""

TILE_OUTPUTS, TILE_BLOCKS = 64, 2
"""The same of a program that multiplies a tile. Not tuned."""

SMALL_TILE, LARGE_TILE = 16, 64
"""Pairs of a tile: small where an expert has few, as half-empty tiles are wasted products."""

_BYTES, _NUMBERS = tl.constexpr(BLOCK_BYTES), tl.constexpr(BLOCK_SIZE)
_NAN_SCALE = tl.constexpr(NAN_SCALE)


def triton_experts(experts: Experts, x_TD: Tensor, expert_id_TA: Tensor, weight_TA: Tensor) -> Tensor:
    """What Experts.forward gives for MXFP4 experts without an adapter: [T, D] in x_TD's dtype."""
    assert experts.packed and experts.adapter is None
    T, A = expert_id_TA.shape
    expert_id_Y, weight_Y = expert_id_TA.flatten().int(), weight_TA.flatten().float()
    gate_up, down = PARTS
    unit_YF = x_TD.new_empty((T * A, experts.get_buffer(f"{down}_scales").shape[2] * BLOCK_SIZE))
    answer_YD = x_TD.new_empty((T * A, x_TD.shape[1]), dtype=torch.float32)
    if T <= MAX_VECTOR_TOKENS:
        _run_vectors(experts, gate_up, x_TD.contiguous(), unit_YF, expert_id_Y, weight_Y, A)
        _run_vectors(experts, down, unit_YF, answer_YD, expert_id_Y, weight_Y, A)
    else:
        tiles = group_pairs(expert_id_Y, experts.num_experts)
        _run_tiles(experts, gate_up, x_TD.contiguous(), unit_YF, tiles, weight_Y, A)
        _run_tiles(experts, down, unit_YF, answer_YD, tiles, weight_Y, A)
    return answer_YD.view(T, A, -1).sum(dim=1).to(x_TD.dtype)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Pairs grouped by expert. order_Y: pairs, those of an expert together. A tile holds the pairs at places
    start_X to stop_X of that order, at most `size` of them from start_X on; a tile too many has none.
    """

    order_Y: Tensor
    expert_X: Tensor
    start_X: Tensor
    stop_X: Tensor
    size: int


def group_pairs(expert_id_Y: Tensor, num_experts: int) -> Tiles:
    """Without a number that the host must wait for: as many tiles as there could be."""
    num_pairs, device = len(expert_id_Y), expert_id_Y.device
    size = LARGE_TILE if num_pairs > SMALL_TILE * num_experts else SMALL_TILE
    ids_Y = expert_id_Y.long()
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
    count_E.scatter_add_(0, ids_Y, torch.ones_like(ids_Y))
    stop_E, tiles_E = count_E.cumsum(0), (count_E + size - 1) // size
    last_tile_E = tiles_E.cumsum(0)
    tile_X = torch.arange(num_pairs // size + num_experts, device=device)
    expert_X = torch.searchsorted(last_tile_E, tile_X, right=True).clamp_(max=num_experts - 1)
    nth_X = tile_X - (last_tile_E - tiles_E)[expert_X]
    # Beyond the last tile of all, the last expert's count goes on, and start lies at or behind stop.
    start_X = (stop_E - count_E)[expert_X] + nth_X * size
    order_Y = ids_Y.argsort(stable=True)
    return Tiles(order_Y.int(), expert_X.int(), start_X.int(), stop_E[expert_X].int(), size)


def _run_vectors(
    experts: Experts, part: str, x: Tensor, out: Tensor, expert_id_Y: Tensor, weight_Y: Tensor, A: int
) -> None:
    blocks, scales = experts.get_buffer(f"{part}_blocks"), experts.get_buffer(f"{part}_scales")
    N, num_blocks = blocks.shape[1:3]
    _multiply_vectors[(len(expert_id_Y), triton.cdiv(N, VECTOR_OUTPUTS))](
        x,
        blocks,
        scales,
        experts.get_parameter(f"{part}_bias"),
        expert_id_Y,
        weight_Y,
        out,
        N,
        num_blocks,
        A,
        experts.limit,
        experts.alpha,
        IS_FIRST=part == PARTS[0],
        OUTPUTS=VECTOR_OUTPUTS,
        BLOCKS=VECTOR_BLOCKS,
    )


def _run_tiles(
    experts: Experts, part: str, x: Tensor, out: Tensor, tiles: Tiles, weight_Y: Tensor, A: int
) -> None:
    blocks, scales = experts.get_buffer(f"{part}_blocks"), experts.get_buffer(f"{part}_scales")
    N, num_blocks = blocks.shape[1:3]
    _multiply_tiles[(len(tiles.expert_X), triton.cdiv(N, TILE_OUTPUTS))](
        x,
        blocks,
        scales,
        experts.get_parameter(f"{part}_bias"),
        tiles.order_Y,
        tiles.expert_X,
        tiles.start_X,
        tiles.stop_X,
        weight_Y,
        out,
        N,
        num_blocks,
        A,
        experts.limit,
        experts.alpha,
        IS_FIRST=part == PARTS[0],
        PRODUCT=product_type(x.dtype),
        ROWS=tiles.size,
        OUTPUTS=TILE_OUTPUTS,
        BLOCKS=TILE_BLOCKS,
    )


@triton.jit
def _multiply_vectors(
    x,
    blocks,
    scales,
    bias,
    expert_id,
    weight,
    out,
    num_outputs,
    num_blocks,
    num_active,
    limit,
    alpha,
    IS_FIRST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> Any:
    """One pair, some outputs. First: a pair's input is its token's row; then its own."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_id + pair).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row_N = expert * num_outputs + n
    is_output = n < num_outputs
    source = x + (pair // num_active if IS_FIRST else pair) * num_blocks * _NUMBERS
    sum_N = tl.zeros((OUTPUTS,), tl.float32)
    for block in range(0, num_blocks, BLOCKS):
        number_NK = _numbers(blocks, scales, row_N, is_output, block, num_blocks, OUTPUTS, BLOCKS)
        k = block * _NUMBERS + tl.arange(0, BLOCKS * _NUMBERS)
        x_K = tl.load(source + k, mask=k < num_blocks * _NUMBERS, other=0.0).to(tl.float32)
        sum_N += tl.sum(number_NK * x_K[None, :], axis=1)
    sum_N += tl.load(bias + row_N, mask=is_output, other=0.0).to(tl.float32)
    if IS_FIRST:
        width = num_outputs // 2
        unit = _swiglu(tl.reshape(sum_N, (1, OUTPUTS)), limit, alpha, 1, OUTPUTS)
        f = tl.program_id(1) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        at = pair * width + f[None, :]
        tl.store(out + at, unit.to(out.dtype.element_ty), mask=(f < width)[None, :])
    else:
        answer_N = sum_N * tl.load(weight + pair)
        tl.store(out + pair * num_outputs + n, answer_N, mask=is_output)


@triton.jit
def _multiply_tiles(
    x,
    blocks,
    scales,
    bias,
    order,
    tile_expert,
    tile_start,
    tile_stop,
    weight,
    out,
    num_outputs,
    num_blocks,
    num_active,
    limit,
    alpha,
    IS_FIRST: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> Any:
    """A tile of one expert's pairs, some outputs. Between the products pairs lie in their grouped order."""
    tile = tl.program_id(0)
    start, stop = tl.load(tile_start + tile), tl.load(tile_stop + tile)
    if start < stop:
        expert = tl.load(tile_expert + tile).to(tl.int64)
        place_M = start + tl.arange(0, ROWS)
        is_pair = place_M < stop
        pair_M = tl.load(order + place_M, mask=is_pair, other=0).to(tl.int64)
        source_M = pair_M // num_active if IS_FIRST else place_M.to(tl.int64)
        n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        row_N = expert * num_outputs + n
        is_output = n < num_outputs
        sum_MN = tl.zeros((ROWS, OUTPUTS), tl.float32)
        for block in range(0, num_blocks, BLOCKS):
            number_NK = _numbers(blocks, scales, row_N, is_output, block, num_blocks, OUTPUTS, BLOCKS)
            k = block * _NUMBERS + tl.arange(0, BLOCKS * _NUMBERS)
            is_input = is_pair[:, None] & (k < num_blocks * _NUMBERS)[None, :]
            at_MK = source_M[:, None] * (num_blocks * _NUMBERS) + k[None, :]
            x_MK = tl.load(x + at_MK, mask=is_input, other=0.0)
            right_KN = tl.trans(number_NK.to(PRODUCT))
            sum_MN += tl.dot(x_MK.to(PRODUCT), right_KN, input_precision="ieee")
        sum_MN += tl.load(bias + row_N, mask=is_output, other=0.0).to(tl.float32)[None, :]
        if IS_FIRST:
            width = num_outputs // 2
            unit_MF = _swiglu(sum_MN, limit, alpha, ROWS, OUTPUTS)
            f = tl.program_id(1) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
            at_MF = place_M.to(tl.int64)[:, None] * width + f[None, :]
            is_unit = is_pair[:, None] & (f < width)[None, :]
            tl.store(out + at_MF, unit_MF.to(out.dtype.element_ty), mask=is_unit)
        else:
            answer_MN = sum_MN * tl.load(weight + pair_M, mask=is_pair, other=0.0)[:, None]
            at_MN = pair_M[:, None] * num_outputs + n[None, :]
            tl.store(out + at_MN, answer_MN, mask=is_pair[:, None] & is_output[None, :])


@triton.jit
def _numbers(
    blocks,
    scales,
    row_N,
    is_output,
    first_block,
    num_blocks,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> Any:
    """float32 [N, 32 B], exact: some blocks of some rows; 0 beyond their ends. Low half bytes come first."""
    b = first_block + tl.arange(0, BLOCKS)
    at_NB = row_N[:, None] * num_blocks + b[None, :]
    is_there = is_output[:, None] & (b < num_blocks)[None, :]
    scale_NB = tl.load(scales + at_NB, mask=is_there, other=0).to(tl.int32)
    at_NBI = at_NB[:, :, None] * _BYTES + tl.arange(0, _BYTES)[None, None, :]
    byte_NBI = tl.load(blocks + at_NBI, mask=is_there[:, :, None], other=0).to(tl.int32)
    number_NBI2 = tl.join(_twice(byte_NBI & 15), _twice(byte_NBI >> 4))
    number_NBI2 = number_NBI2 * _half_factor(scale_NB)[:, :, None, None]
    return tl.reshape(number_NBI2, (OUTPUTS, BLOCKS * _NUMBERS))


@triton.jit
def _twice(half_byte) -> Any:
    """An E2M1 number, a sign, two bits of exponent and one of fraction, times two: then it is whole."""
    exponent = (half_byte >> 1) & 3
    fraction = half_byte & 1
    size = tl.where(exponent == 0, fraction, (2 + fraction) << tl.maximum(exponent - 1, 0))
    return tl.where(half_byte >= 8, -size, size).to(tl.float32)


@triton.jit
def _half_factor(scale) -> Any:
    """2**(scale - 127) / 2 by its bits: a power function may flush the smallest two to 0."""
    bits = tl.where(scale >= 2, (scale - 1) << 23, 0x00200000 << (scale & 1))
    bits = tl.where(scale == _NAN_SCALE, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _swiglu(gate_up_MN, limit, alpha, ROWS: tl.constexpr, OUTPUTS: tl.constexpr) -> Any:
    """Clamped SwiGLU of alternating gate and up: [M, N / 2]. NaN stays NaN."""
    gate, up = tl.split(tl.reshape(gate_up_MN, (ROWS, OUTPUTS // 2, 2)))
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1 + tl.exp(-alpha * gate)) * (up + 1)
