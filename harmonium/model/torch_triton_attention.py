"""Paged attention with sinks and windows, in Triton: for TorchRunner, on CUDA or in Triton's interpreter.

Keys and values are read where they lie, block by block through the block tables; nothing is gathered. A
program takes a tile of queries of one sequence with one key/value head, so that the R heads of its group
share every block read, and a piece of the context; pieces are more where programs would be too few for the
card (one sequence that decodes). A second kernel joins the pieces and counts the sink, which is one more
summand of the softmax.

    tiles = lay_out(batch.position_T, batch.query_start_S1, table_SB, window, H, G, device)   # once a step
    mixed_THK = paged_attention(query_THK, key_cache_NPGK, value_cache_NPGK, sink_H, tiles, scale)

Dimension letters: docs/architecture.md; X tiles, M rows of a tile (query * R + head of the group), J pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from harmonium.config import CACHE_BLOCK_TOKENS
from harmonium.model.torch_triton import product_type

WANTED_PROGRAMS = 512
"""Pieces are added until there are as many programs: a few for each processor of a large card. Not tuned."""

SHORTEST_PIECE = 8 * CACHE_BLOCK_TOKENS
"""Positions; a shorter piece would be joined longer than it is computed. Not tuned."""

_FIELDS = tl.constexpr(4)
"""Numbers that say what a tile is."""

_P = tl.constexpr(CACHE_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class PagedTiles:
    """How a step's queries are cut, for the layers of one kind.

    tile_X4: int32 (first row, queries, position of the first, sequence) of each tile. rows: M.
    piece_tokens: positions of a piece, whole blocks; it counts from the first block that a tile sees.
    """

    tile_X4: Tensor
    table_SB: Tensor
    window: int
    rows: int
    num_pieces: int
    piece_tokens: int


def lay_out(
    position_T: npt.NDArray[np.int32],
    query_start_S1: npt.NDArray[np.int32],
    table_SB: npt.NDArray[np.int32],
    window: int,
    num_heads: int,
    num_kv_heads: int,
    device: torch.device,
    capacity: int = 0,
) -> PagedTiles:
    """Cut a step's queries into tiles. window: 0 is full attention.

    capacity: cut as if a sequence had so many positions; 0: as many as there are.
    """
    group = num_heads // num_kv_heads
    count_S = np.diff(query_start_S1)
    rows = max(16 if count_S.max() == 1 else 64, triton.next_power_of_2(group))
    size = rows // group
    tiles = []
    for sequence, (start, count) in enumerate(
        zip(query_start_S1[:-1].tolist(), count_S.tolist(), strict=True)
    ):
        position = int(position_T[start])
        tiles += [
            (start + done, min(size, count - done), position + done, sequence)
            for done in range(0, count, size)
        ]
    tile_X4 = np.array(tiles, np.int32)
    first_X = np.maximum(0, tile_X4[:, 2] - window + 1) if window else np.zeros_like(tile_X4[:, 2])
    first_X -= first_X % CACHE_BLOCK_TOKENS
    longest = int((tile_X4[:, 1] + tile_X4[:, 2] - first_X).max())
    if capacity:
        # The window of a tile's first query may begin anywhere in a block.
        seen = window + size + CACHE_BLOCK_TOKENS if window else capacity
        longest = max(longest, min(capacity, seen))
    wanted = -(-WANTED_PROGRAMS // (len(tiles) * num_kv_heads))
    piece = max(SHORTEST_PIECE, -(-longest // wanted))
    piece += -piece % CACHE_BLOCK_TOKENS
    return PagedTiles(
        torch.from_numpy(tile_X4).to(device),
        torch.from_numpy(np.ascontiguousarray(table_SB, np.int32)).to(device),
        window,
        rows,
        -(-longest // piece),
        piece,
    )


def paged_attention(
    query_THK: Tensor,
    key_cache_NPGK: Tensor,
    value_cache_NPGK: Tensor,
    sink_H: Tensor,
    tiles: PagedTiles,
    scale: float,
) -> Tensor:
    """[T, H, K] in query_THK's dtype; scores, sums and what is joined are float32."""
    T, H, K = query_THK.shape
    _, P, G, _ = key_cache_NPGK.shape
    assert P == CACHE_BLOCK_TOKENS and value_cache_NPGK.shape == key_cache_NPGK.shape
    assert key_cache_NPGK.is_contiguous() and value_cache_NPGK.is_contiguous()
    query_THK = query_THK.contiguous()
    part_JTHK = query_THK.new_empty((tiles.num_pieces, T, H, K), dtype=torch.float32)
    lse_JTH = query_THK.new_empty((tiles.num_pieces, T, H), dtype=torch.float32)
    size = max(16, triton.next_power_of_2(K))  # a product's sides are powers of two, at least 16
    grid = (len(tiles.tile_X4), G, tiles.num_pieces)
    _attend_piece[grid](
        query_THK,
        key_cache_NPGK,
        value_cache_NPGK,
        tiles.table_SB,
        tiles.tile_X4,
        part_JTHK,
        lse_JTH,
        T,
        tiles.table_SB.shape[1],
        tiles.piece_tokens,
        scale,
        WINDOW=tiles.window,
        H=H,
        G=G,
        K=K,
        SIZE=size,
        ROWS=tiles.rows,
        PRODUCT=product_type(query_THK.dtype),
    )
    mixed_THK = torch.empty_like(query_THK)
    _join_pieces[(T * H,)](
        part_JTHK, lse_JTH, sink_H.contiguous(), mixed_THK, tiles.num_pieces, T * H, H=H, K=K, SIZE=size
    )
    return mixed_THK


@triton.jit
def _attend_piece(
    query,
    key_cache,
    value_cache,
    table,
    tiles,
    part,
    lse,
    num_tokens,
    table_width,
    piece_tokens,
    scale,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> Any:
    """Softmax over a piece of the context, without the sink, and its log-sum-exp; -inf where none is seen."""
    group, piece = tl.program_id(1), tl.program_id(2)
    tile = tiles + tl.program_id(0) * _FIELDS
    first_row, count = tl.load(tile), tl.load(tile + 1)
    position, sequence = tl.load(tile + 2), tl.load(tile + 3)
    m, j = tl.arange(0, ROWS), tl.arange(0, SIZE)
    query_M = m // (H // G)
    row_M = (first_row + query_M).to(tl.int64) * H + group * (H // G) + m % (H // G)
    at_MJ = row_M[:, None] * K + j[None, :]
    is_number = (query_M < count)[:, None] & (j < K)[None, :]
    query_MJ = tl.load(query + at_MJ, mask=is_number, other=0.0).to(PRODUCT)
    last_M = tl.where(query_M < count, position + query_M, -1)  # a row too many sees nothing
    first_seen = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else position * 0
    begin = first_seen // _P * _P + piece * piece_tokens
    end = tl.maximum(tl.minimum(begin + piece_tokens, position + count), begin)
    top_M = tl.full((ROWS,), float("-inf"), tl.float32)
    total_M = tl.zeros((ROWS,), tl.float32)
    mixed_MJ = tl.zeros((ROWS, SIZE), tl.float32)
    for block in range(begin // _P, tl.cdiv(end, _P)):
        page = tl.load(table + sequence * table_width + block).to(tl.int64)
        seen_S = block * _P + tl.arange(0, _P)
        at_SJ = ((page * _P + tl.arange(0, _P)) * G + group)[:, None] * K + j[None, :]
        # What was never written, or belongs to nobody any more, may be anything: even NaN.
        is_there = (seen_S < end)[:, None] & (j < K)[None, :]
        key_SJ = tl.load(key_cache + at_SJ, mask=is_there, other=0.0)
        value_SJ = tl.load(value_cache + at_SJ, mask=is_there, other=0.0)
        score_MS = tl.dot(query_MJ, tl.trans(key_SJ.to(PRODUCT)), input_precision="ieee") * scale
        is_seen = seen_S[None, :] <= last_M[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (seen_S[None, :] > last_M[:, None] - WINDOW)
        score_MS = tl.where(is_seen, score_MS, float("-inf"))
        top_M, total_M, mixed_MJ = _add_block(score_MS, value_SJ, top_M, total_M, mixed_MJ, PRODUCT)
    share_M = tl.where(total_M == 0.0, 1.0, total_M)
    lse_M = tl.where(total_M == 0.0, float("-inf"), top_M + tl.log(share_M))
    base = piece.to(tl.int64) * num_tokens * H
    tl.store(part + base * K + at_MJ, mixed_MJ / share_M[:, None], mask=is_number)
    tl.store(lse + base + row_M, lse_M, mask=query_M < count)


@triton.jit
def _add_block(score_MS, value_SJ, top_M, total_M, mixed_MJ, PRODUCT: tl.constexpr) -> Any:
    """(highest score, sum of exponentials below it, values weighted with them), with one more block."""
    new_top_M = tl.maximum(top_M, tl.max(score_MS, axis=1))
    # A row that has seen nothing yet must not subtract infinity from itself.
    base_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
    weight_MS = tl.exp(score_MS - base_M[:, None])
    shrink_M = tl.exp(top_M - base_M)
    left_MS = weight_MS.to(value_SJ.dtype).to(PRODUCT)
    product_MJ = tl.dot(left_MS, value_SJ.to(PRODUCT), input_precision="ieee")
    return (
        new_top_M,
        total_M * shrink_M + tl.sum(weight_MS, axis=1),
        mixed_MJ * shrink_M[:, None] + product_MJ,
    )


@triton.jit
def _join_pieces(
    part, lse, sink, mixed, num_pieces, num_rows, H: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr
) -> Any:
    """Pieces weighted by their log-sum-exp; the sink takes its share and adds nothing."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, SIZE)
    sink_score = tl.load(sink + row % H).to(tl.float32)
    top = sink_score
    for piece in range(num_pieces):
        top = tl.maximum(top, tl.load(lse + piece * num_rows + row))
    total = tl.exp(sink_score - top)
    mixed_J = tl.zeros((SIZE,), tl.float32)
    for piece in range(num_pieces):
        at = piece * num_rows + row
        weight = tl.exp(tl.load(lse + at) - top)
        total += weight
        mixed_J += weight * tl.load(part + at * K + j, mask=j < K, other=0.0)
    tl.store(mixed + row * K + j, (mixed_J / total).to(mixed.dtype.element_ty), mask=j < K)
