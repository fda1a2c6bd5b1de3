"""Attention with sinks and windows over packed samples, in PyTorch, with memory linear in the tokens.

A query sees the keys of rows first_Q to last_Q: causality, the window and the borders between samples are
these two numbers. Queries are taken a tile at a time; scores of a tile are computed, used and dropped, and
the backward pass computes them again from the saved log-sum-exp. Scores and sums are float32 whatever the
inputs are.

Dimension letters: Q queries, S keys, H query heads, G key/value heads, R = H/G, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE_SCORES = 1 << 22
"""Scores in memory at once, where a tile of MIN_TILE queries allows: 16 MB in float32, a few times."""

MIN_TILE, MAX_TILE = 16, 256
"""Queries in a tile. Fewer make small products, more waste work on keys that only a part of the tile sees."""


def sink_attention(
    query_QHK: Tensor,
    key_SGK: Tensor,
    value_SGK: Tensor,
    sink_H: Tensor,
    first_Q: Tensor,
    last_Q: Tensor,
    scale: float,
) -> Tensor:
    """Mixed values [Q, H, K] in query_QHK's dtype; differentiable in the first four arguments.

    first_Q, last_Q: int64, on any device: the first and last row of key_SGK that each query sees. Neither may
    fall from one query to the next, and each query sees at least one key.
    """
    out: Tensor = _SinkAttention.apply(  # type: ignore[no-untyped-call]
        query_QHK, key_SGK, value_SGK, sink_H, first_Q, last_Q, scale
    )
    return out


class _SinkAttention(torch.autograd.Function):
    """The sink is one more column of scores, which takes its share of the softmax and has no value."""

    @staticmethod
    def forward(
        ctx: Any,
        query_QHK: Tensor,
        key_SGK: Tensor,
        value_SGK: Tensor,
        sink_H: Tensor,
        first_Q: Tensor,
        last_Q: Tensor,
        scale: float,
    ) -> Tensor:
        Q, H, _ = query_QHK.shape
        G = key_SGK.shape[1]
        key_GSK, value_GSK = _by_group(key_SGK), _by_group(value_SGK)
        out_QHK = torch.empty_like(query_QHK)
        total_GRQ = query_QHK.new_empty((G, H // G, Q), dtype=torch.float32)
        sink_GR1 = sink_H.float().view(G, H // G, 1)
        for rows, seen, hidden_QS in _tiles(first_Q, last_Q, H):
            query_GNK = _tile_rows(query_QHK[rows], G)
            score_GRQS = _scores(query_GNK, key_GSK[:, seen], hidden_QS, scale)
            total = torch.logaddexp(score_GRQS.logsumexp(dim=-1), sink_GR1)
            weight_GRQS = score_GRQS.sub_(total[..., None]).exp_()
            mixed_GNK = weight_GRQS.flatten(1, 2) @ value_GSK[:, seen]
            out_QHK[rows] = _untile_rows(mixed_GNK, H).to(out_QHK.dtype)
            total_GRQ[:, :, rows] = total
        ctx.save_for_backward(query_QHK, key_SGK, value_SGK, sink_H, first_Q, last_Q, out_QHK, total_GRQ)
        ctx.scale = scale
        return out_QHK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_QHK, key_SGK, value_SGK, sink_H, first_Q, last_Q, out_QHK, total_GRQ = ctx.saved_tensors
        grad_QHK = grads[0]
        H, G = query_QHK.shape[1], key_SGK.shape[1]
        key_GSK, value_GSK = _by_group(key_SGK), _by_group(value_SGK)
        query_grad_QHK = torch.empty_like(query_QHK)
        key_grad_GSK, value_grad_GSK = torch.zeros_like(key_GSK), torch.zeros_like(value_GSK)
        sink_GR1 = sink_H.float().view(G, H // G, 1)
        sink_grad_GR = torch.zeros_like(sink_GR1[..., 0])
        for rows, seen, hidden_QS in _tiles(first_Q, last_Q, H):
            query_GNK, grad_GNK = _tile_rows(query_QHK[rows], G), _tile_rows(grad_QHK[rows], G)
            total = total_GRQ[:, :, rows]
            score_GRQS = _scores(query_GNK, key_GSK[:, seen], hidden_QS, ctx.scale)
            weight_GNS = score_GRQS.sub_(total[..., None]).exp_().flatten(1, 2)
            value_grad_GSK[:, seen] += weight_GNS.mT @ grad_GNK
            # d score = weight * (d weight - its mean under all the weights), and that mean is grad . out.
            mean_GN = (grad_GNK * _tile_rows(out_QHK[rows], G)).sum(dim=-1)
            score_grad_GNS = (grad_GNK @ value_GSK[:, seen].mT).sub_(mean_GN[..., None]).mul_(weight_GNS)
            query_grad_QHK[rows] = _untile_rows(score_grad_GNS @ key_GSK[:, seen], H).to(query_QHK.dtype)
            key_grad_GSK[:, seen] += score_grad_GNS.mT @ query_GNK
            # The sink's own d weight is 0: it has no value.
            sink_weight_GRQ = (sink_GR1 - total).exp()
            sink_grad_GR -= (sink_weight_GRQ * mean_GN.view_as(total)).sum(dim=-1)
        return (
            query_grad_QHK.mul_(ctx.scale),
            key_grad_GSK.mul_(ctx.scale).transpose(0, 1).to(key_SGK.dtype),
            value_grad_GSK.transpose(0, 1).to(value_SGK.dtype),
            sink_grad_GR.flatten().to(sink_H.dtype),
            None,
            None,
            None,
        )


def _tiles(first_Q: Tensor, last_Q: Tensor, num_heads: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of queries, rows of keys that any of them sees, bool [queries, keys]: what must not be seen)."""
    device, num_queries = first_Q.device, first_Q.numel()
    firsts, lasts = first_Q.tolist(), last_Q.tolist()
    start = 0
    while start < num_queries:
        # The keys of a tile grow with it, so its size is guessed from those of its first query.
        width = lasts[start] - firsts[start] + 1
        size = max(MIN_TILE, min(MAX_TILE, TILE_SCORES // (num_heads * (width + MIN_TILE))))
        stop = min(num_queries, start + size)
        rows, seen = slice(start, stop), slice(firsts[start], lasts[stop - 1] + 1)
        key_S = torch.arange(seen.start, seen.stop, device=device)
        yield rows, seen, (key_S < first_Q[rows, None]) | (key_S > last_Q[rows, None])
        start = stop


def _scores(query_GNK: Tensor, key_GSK: Tensor, hidden_QS: Tensor, scale: float) -> Tensor:
    G, N, _ = query_GNK.shape
    score_GNS = (query_GNK @ key_GSK.mT).mul_(scale)
    score_GRQS = score_GNS.view(G, N // len(hidden_QS), *hidden_QS.shape)
    return score_GRQS.masked_fill_(hidden_QS, float("-inf"))


def _by_group(x_SGK: Tensor) -> Tensor:
    """[G, S, K] float32, contiguous."""
    return x_SGK.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def _tile_rows(x_QHK: Tensor, num_groups: int) -> Tensor:
    """[Q, H, K] -> float32 [G, N = R Q, K], so that a group's heads share one product with its keys."""
    Q, H, K = x_QHK.shape
    grouped = x_QHK.view(Q, num_groups, H // num_groups, K).permute(1, 2, 0, 3)
    return grouped.reshape(num_groups, -1, K).float()


def _untile_rows(x_GNK: Tensor, num_heads: int) -> Tensor:
    """[G, R Q, K] -> [Q, H, K]."""
    G, _, K = x_GNK.shape
    x_GRQK = x_GNK.view(G, num_heads // G, -1, K)
    return x_GRQK.permute(2, 0, 1, 3).reshape(-1, num_heads, K)
