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
from harmonium.model.torch_triton import is_compiled, product_type

MAX_VECTOR_TOKENS = 4
"""Most tokens of a step whose products are matrix times vector. Not tuned."""

VECTOR_OUTPUTS, VECTOR_BLOCKS = 32, 8
"""Of a program: rows, and blocks of each that it reads at a time. Of eight choices the best on an H200."""


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a tile of `rows` pairs is multiplied: outputs of a program, blocks of each that it reads at a time,
    its warps, and how many reads are under way.
    """

    rows: int
    outputs: int
    blocks: int
    warps: int
    stages: int


TILE_SHAPES = (TileShape(16, 64, 2, 4, 4), TileShape(64, 128, 4, 8, 3), TileShape(128, 128, 2, 8, 4))
"""Small where an expert has few pairs, as half-empty tiles waste products. The best of eleven on an H200."""

MAX_PAIRS_AT_ONCE = 256
"""Pairs that one program groups: the square of them are compared."""

_BYTES, _NUMBERS = tl.constexpr(BLOCK_BYTES), tl.constexpr(BLOCK_SIZE)
_NAN_SCALE = tl.constexpr(NAN_SCALE)

_UNPACK = tl.constexpr("""
{
  .reg .b32 pair, sign;
  prmt.b32 pair, $4, 0, 0x1404;
  and.b32 sign, pair, 0x80008000;
  and.b32 $2, pair, 0x70007000;
  shr.b32 $2, $2, 6;
  or.b32 $2, $2, sign;
  shl.b32 pair, pair, 4;
  and.b32 sign, pair, 0x80008000;
  and.b32 $0, pair, 0x70007000;
  shr.b32 $0, $0, 6;
  or.b32 $0, $0, sign;
  prmt.b32 pair, $4, 0, 0x3424;
  and.b32 sign, pair, 0x80008000;
  and.b32 $3, pair, 0x70007000;
  shr.b32 $3, $3, 6;
  or.b32 $3, $3, sign;
  shl.b32 pair, pair, 4;
  and.b32 sign, pair, 0x80008000;
  and.b32 $1, pair, 0x70007000;
  shr.b32 $1, $1, 6;
  or.b32 $1, $1, sign;
  mov.b32 pair, 0x7e807e80;
  mov.b32 sign, 0x80008000;
  fma.rn.bf16x2 $0, $0, pair, sign;
  fma.rn.bf16x2 $1, $1, pair, sign;
  fma.rn.bf16x2 $2, $2, pair, sign;
  fma.rn.bf16x2 $3, $3, pair, sign;
}
""")
"""PTX for four bytes: their low halves as bf16 in $0 and $1, their high halves in $2 and $3.

A half byte's sign, exponent and fraction lie in bf16's own order, so they are moved to its sign, its lowest
exponent bits and its highest fraction bit; that is the number times 2**-126 (a half is a subnormal number),
and 2**126 is what they are multiplied by. Exact.
"""


def triton_experts(experts: Experts, x_TD: Tensor, expert_id_TA: Tensor, weight_TA: Tensor) -> Tensor:
    """What Experts.forward gives for MXFP4 experts without an adapter: [T, D] in x_TD's dtype."""
    answer_TAD = expert_answers(experts, split_blocks(x_TD), expert_id_TA, weight_TA)
    return answer_TAD.sum(dim=1).to(x_TD.dtype)


def split_blocks(x_TD: Tensor) -> Tensor:
    """Of each 32 neighbors those at even places first, as the weights come out of their bytes."""
    split_TD: Tensor = x_TD.unflatten(1, (-1, BLOCK_BYTES, 2)).transpose(2, 3).flatten(1)
    return split_TD


def expert_answers(experts: Experts, x_TD: Tensor, expert_id_TA: Tensor, weight_TA: Tensor) -> Tensor:
    """The weighted answer of each chosen expert: float32 [T, A, D]. x_TD: from split_blocks."""
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
    return answer_YD.view(T, A, -1)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Pairs grouped by expert. order_Y: pairs, those of an expert together. A tile holds the pairs at places
    start_X to stop_X of that order, at most shape.rows of them from start_X on; a tile too many has none.
    """

    order_Y: Tensor
    expert_X: Tensor
    start_X: Tensor
    stop_X: Tensor
    shape: TileShape


def group_pairs(expert_id_Y: Tensor, num_experts: int) -> Tiles:
    """Without a number that the host must wait for: as many tiles as there could be."""
    num_pairs, device = len(expert_id_Y), expert_id_Y.device
    # The next shape up where an expert has more pairs, or twice as many, than a tile on average.
    chosen = (num_pairs > TILE_SHAPES[0].rows * num_experts) + (
        num_pairs > 2 * TILE_SHAPES[1].rows * num_experts
    )
    shape = TILE_SHAPES[chosen]
    num_tiles = num_pairs // shape.rows + num_experts
    if num_pairs <= MAX_PAIRS_AT_ONCE:
        order_Y = torch.empty(num_pairs, dtype=torch.int32, device=device)
        found_3X = torch.empty((3, num_tiles), dtype=torch.int32, device=device)
        _group_pairs[(1,)](
            expert_id_Y,
            order_Y,
            found_3X,
            num_tiles,
            PAIRS=num_pairs,
            EXPERTS=num_experts,
            Y=triton.next_power_of_2(num_pairs),
            E=triton.next_power_of_2(num_experts),
            X=triton.next_power_of_2(num_tiles),
            ROWS=shape.rows,
        )
        return Tiles(order_Y, found_3X[0], found_3X[1], found_3X[2], shape)
    ids_Y = expert_id_Y.long()
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
    count_E.scatter_add_(0, ids_Y, torch.ones_like(ids_Y))
    stop_E, tiles_E = count_E.cumsum(0), (count_E + shape.rows - 1) // shape.rows
    last_tile_E = tiles_E.cumsum(0)
    tile_X = torch.arange(num_tiles, device=device)
    expert_X = torch.searchsorted(last_tile_E, tile_X, right=True).clamp_(max=num_experts - 1)
    nth_X = tile_X - (last_tile_E - tiles_E)[expert_X]
    # Beyond the last tile of all, the last expert's count goes on, and start lies at or behind stop.
    start_X = (stop_E - count_E)[expert_X] + nth_X * shape.rows
    order_Y = ids_Y.argsort(stable=True)
    return Tiles(order_Y.int(), expert_X.int(), start_X.int(), stop_E[expert_X].int(), shape)


@triton.jit
def _group_pairs(
    expert_id,
    order,
    found,
    num_tiles,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    Y: tl.constexpr,
    E: tl.constexpr,
    X: tl.constexpr,
    ROWS: tl.constexpr,
) -> Any:
    """group_pairs of few pairs in one program: each pair is compared with each."""
    y, e, x = tl.arange(0, Y), tl.arange(0, E), tl.arange(0, X)
    id_Y = tl.load(expert_id + y, mask=y < PAIRS, other=E)
    again = tl.arange(0, Y)  # the same along the other side
    id_again = tl.load(expert_id + again, mask=again < PAIRS, other=E)
    is_before = (id_again[None, :] < id_Y[:, None]) | (
        (id_again[None, :] == id_Y[:, None]) & (again[None, :] < y[:, None])
    )
    place_Y = tl.sum(is_before.to(tl.int32), axis=1)
    tl.store(order + place_Y, y, mask=y < PAIRS)
    count_E = tl.sum((id_Y[:, None] == e[None, :]).to(tl.int32), axis=0)
    stop_E, tiles_E = tl.cumsum(count_E, axis=0), (count_E + ROWS - 1) // ROWS
    last_tile_E = tl.cumsum(tiles_E, axis=0)
    expert_X = tl.sum(((last_tile_E[None, :] <= x[:, None]) & (e < EXPERTS)[None, :]).to(tl.int32), axis=1)
    expert_X = tl.minimum(expert_X, EXPERTS - 1)
    is_mine = expert_X[:, None] == e[None, :]
    nth_X = x - tl.sum(tl.where(is_mine, (last_tile_E - tiles_E)[None, :], 0), axis=1)
    start_X = tl.sum(tl.where(is_mine, (stop_E - count_E)[None, :], 0), axis=1) + nth_X * ROWS
    stop_X = tl.sum(tl.where(is_mine, stop_E[None, :], 0), axis=1)
    is_tile = x < num_tiles
    tl.store(found + x, expert_X, mask=is_tile)
    tl.store(found + num_tiles + x, start_X, mask=is_tile)
    tl.store(found + 2 * num_tiles + x, stop_X, mask=is_tile)


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
        COMPILED=is_compiled(),
    )


def _run_tiles(
    experts: Experts, part: str, x: Tensor, out: Tensor, tiles: Tiles, weight_Y: Tensor, A: int
) -> None:
    blocks, scales = experts.get_buffer(f"{part}_blocks"), experts.get_buffer(f"{part}_scales")
    N, num_blocks = blocks.shape[1:3]
    _multiply_tiles[(len(tiles.expert_X), triton.cdiv(N, tiles.shape.outputs))](
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
        ROWS=tiles.shape.rows,
        OUTPUTS=tiles.shape.outputs,
        BLOCKS=tiles.shape.blocks,
        COMPILED=is_compiled(),
        num_warps=tiles.shape.warps,
        num_stages=tiles.shape.stages,
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
    COMPILED: tl.constexpr,
) -> Any:
    """One pair, some outputs. First: a pair's input is its token's row; then its own. From split_blocks."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_id + pair).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row_N = expert * num_outputs + tl.minimum(n, num_outputs - 1)
    source = x + (pair // num_active if IS_FIRST else pair) * num_blocks * _NUMBERS
    i = tl.arange(0, _BYTES)
    sum_NB = tl.zeros((OUTPUTS, BLOCKS), tl.float32)
    for block in range(0, num_blocks, BLOCKS):
        low_NBI, high_NBI, factor_NB = _numbers(blocks, scales, row_N, block, num_blocks, BLOCKS, COMPILED)
        b = tl.minimum(block + tl.arange(0, BLOCKS), num_blocks - 1)
        at_BI = b[:, None] * _NUMBERS + i[None, :]
        even_BI = tl.load(source + at_BI).to(tl.float32)
        odd_BI = tl.load(source + at_BI + _BYTES).to(tl.float32)
        product_NBI = low_NBI.to(tl.float32) * even_BI[None] + high_NBI.to(tl.float32) * odd_BI[None]
        sum_NB += tl.sum(product_NBI, axis=2) * factor_NB
    is_output = n < num_outputs
    sum_N = tl.sum(sum_NB, axis=1) + tl.load(bias + row_N).to(tl.float32)
    if IS_FIRST:
        width = num_outputs // 2
        unit = _swiglu(tl.reshape(sum_N, (1, OUTPUTS)), limit, alpha, 1, OUTPUTS)
        f = tl.program_id(1) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        at = pair * width + split_place(f)[None, :]
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
    COMPILED: tl.constexpr,
) -> Any:
    """A tile of one expert's pairs, some outputs. Between the products pairs lie in their grouped order."""
    tile = tl.program_id(0)
    start, stop = tl.load(tile_start + tile), tl.load(tile_stop + tile)
    if start < stop:
        expert = tl.load(tile_expert + tile).to(tl.int64)
        place_M = start + tl.arange(0, ROWS)
        is_pair = place_M < stop
        # What lies beyond an end is computed as its last row once more, and not stored.
        last_M = tl.minimum(place_M, stop - 1)
        pair_M = tl.load(order + last_M).to(tl.int64)
        source_M = (pair_M // num_active if IS_FIRST else last_M.to(tl.int64)) * (num_blocks * _NUMBERS)
        n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        row_N = expert * num_outputs + tl.minimum(n, num_outputs - 1)
        sum_NM = tl.zeros((OUTPUTS, ROWS), tl.float32)
        byte_K = tl.arange(0, BLOCKS * _BYTES)
        for block in range(0, num_blocks, BLOCKS):
            low_NBI, high_NBI, scale_NB = _numbers(blocks, scales, row_N, block, num_blocks, BLOCKS, COMPILED)
            factor_NB1 = scale_NB.to(PRODUCT)[:, :, None]
            low_NK = tl.reshape(low_NBI.to(PRODUCT) * factor_NB1, (OUTPUTS, BLOCKS * _BYTES))
            high_NK = tl.reshape(high_NBI.to(PRODUCT) * factor_NB1, (OUTPUTS, BLOCKS * _BYTES))
            b_K = tl.minimum(block + byte_K // _BYTES, num_blocks - 1)
            at_KM = x + source_M[None, :] + (b_K * _NUMBERS + byte_K % _BYTES)[:, None]
            # The numbers on the left: tensor cores take that side from registers.
            sum_NM += tl.dot(low_NK, tl.load(at_KM).to(PRODUCT), input_precision="ieee")
            sum_NM += tl.dot(high_NK, tl.load(at_KM + _BYTES).to(PRODUCT), input_precision="ieee")
        sum_MN = tl.trans(sum_NM) + tl.load(bias + row_N).to(tl.float32)[None, :]
        if IS_FIRST:
            width = num_outputs // 2
            unit_MF = _swiglu(sum_MN, limit, alpha, ROWS, OUTPUTS)
            f = tl.program_id(1) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
            at_MF = place_M.to(tl.int64)[:, None] * width + split_place(f)[None, :]
            is_unit = is_pair[:, None] & (f < width)[None, :]
            tl.store(out + at_MF, unit_MF.to(out.dtype.element_ty), mask=is_unit)
        else:
            at_MN = pair_M[:, None] * num_outputs + n[None, :]
            is_answer = is_pair[:, None] & (n < num_outputs)[None, :]
            tl.store(out + at_MN, sum_MN * tl.load(weight + pair_M)[:, None], mask=is_answer)


@triton.jit
def split_place(f) -> Any:
    """Where split_blocks puts the number at place f."""
    return f // _NUMBERS * _NUMBERS + f % 2 * _BYTES + f % _NUMBERS // 2


@triton.jit
def _numbers(
    blocks,
    scales,
    row_N,
    first_block,
    num_blocks,
    BLOCKS: tl.constexpr,
    COMPILED: tl.constexpr,
) -> Any:
    """(numbers of even places [N, B, 16], of odd ones, float32 factors [N, B]) of some blocks of some rows.

    Exact; the factor of a block beyond the last is 0. Numbers are bf16 where they are compiled, else float32.
    """
    b = first_block + tl.arange(0, BLOCKS)
    at_NB = row_N[:, None] * num_blocks + tl.minimum(b, num_blocks - 1)[None, :]
    factor_NB = tl.where((b < num_blocks)[None, :], _factor(tl.load(scales + at_NB).to(tl.int32)), 0.0)
    byte_NBI = tl.load(blocks + at_NB[:, :, None] * _BYTES + tl.arange(0, _BYTES)[None, None, :])
    if COMPILED:
        low_NBI, high_NBI = tl.inline_asm_elementwise(
            _UNPACK,
            "=&r,=&r,=&r,=&r,r",
            [byte_NBI],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low_NBI = _number(byte_NBI.to(tl.int32) & 15)
        high_NBI = _number(byte_NBI.to(tl.int32) >> 4)
    return low_NBI, high_NBI, factor_NB


@triton.jit
def _number(half_byte) -> Any:
    """An E2M1 number: a sign, two bits of exponent, one of fraction. Times two it is whole."""
    exponent = (half_byte >> 1) & 3
    fraction = half_byte & 1
    size = tl.where(exponent == 0, fraction, (2 + fraction) << tl.maximum(exponent - 1, 0))
    return tl.where(half_byte >= 8, -size, size).to(tl.float32) * 0.5


@triton.jit
def _factor(scale) -> Any:
    """2**(scale - 127) by its bits: a power function may flush the smallest to 0."""
    bits = tl.where(scale >= 1, scale << 23, 0x00400000)
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
