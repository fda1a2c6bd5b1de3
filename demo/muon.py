"""Muon: momentum whose matrices are made orthogonal before they are applied.

Source: the method and the coefficients of the iteration are Keller Jordan's
(https://kellerjordan.github.io/posts/muon/).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM, WEIGHT_DECAY, ITERATIONS = 0.95, 0.05, 5


class Muon:
    """For weights [..., rows, columns]. rank of world: each process orthogonalizes its share."""

    def __init__(self, weights: list[nn.Parameter], rank: int = 0, world: int = 1) -> None:
        self._weights, self._rank, self._world = weights, rank, world
        self.momentum = [torch.zeros_like(weight) for weight in weights]

    def load(self, momentum: list[Tensor]) -> None:
        for mine, saved in zip(self.momentum, momentum, strict=True):
            mine.copy_(saved)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        groups: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
        for weight, momentum in zip(self._weights, self.momentum, strict=True):
            assert weight.grad is not None, "every matrix is used in every step"
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = weight.grad.lerp(momentum, MOMENTUM)
            matrices = update.view(-1, *update.shape[-2:])
            groups.setdefault(tuple(matrices.shape[1:]), []).append((weight, matrices))
        for (rows, columns), group in groups.items():
            directions = self._orthogonal(torch.cat([matrices for _, matrices in group]))
            scale = rate * max(1.0, rows / columns) ** 0.5
            parts = directions.split([len(matrices) for _, matrices in group])
            for (weight, _), direction in zip(group, parts, strict=True):
                weight.mul_(1 - rate * WEIGHT_DECAY).add_(direction.view_as(weight), alpha=-scale)

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        if self._world == 1:
            return orthogonal(matrices)
        parts = torch.tensor_split(matrices, self._world)
        largest = max(map(len, parts))
        mine = torch.zeros(largest, *matrices.shape[1:])
        if len(parts[self._rank]):
            mine[: len(parts[self._rank])] = orthogonal(parts[self._rank])
        gathered = [torch.empty_like(mine) for _ in range(self._world)]
        dist.all_gather(gathered, mine)
        return torch.cat([found[: len(part)] for found, part in zip(gathered, parts, strict=True)])


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, rows, columns]: singular values moved to about 1 by five Newton-Schulz iterations in bf16."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(1, 2) if is_tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(ITERATIONS):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return (x.transpose(1, 2) if is_tall else x).float()
