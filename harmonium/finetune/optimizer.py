"""How weights are changed: AdamW for everything, or Muon for matrices and AdamW for the rest.

All state is float32 tensors under names, so that it can be saved and read back to the bit.

Source of Muon, its coefficients and the factor for tall matrices: Keller Jordan,
https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from harmonium.finetune.processes import World
from harmonium.finetune.settings import FinetuneSettings

BETAS, EPSILON = (0.9, 0.95), 1e-10
MOMENTUM, ITERATIONS = 0.95, 5
SMALLEST_RATE = 0.02
"""Share of the highest rate that falling schedules end at."""

_NOT_FOR_MUON = ("embed_tokens", "lm_head", "router")

Named = Sequence[tuple[str, nn.Parameter]]


class Optimizer:
    """AdamW, and Muon where asked for; `step` takes the share of the highest rates that is due."""

    def __init__(self, named: Named, settings: FinetuneSettings, world: World | None = None) -> None:
        self._world = world or World()
        uses_muon = settings.optimizer == "muon"
        self._muon = [(name, value) for name, value in named if uses_muon and _is_muon(name, value)]
        chosen = {name for name, _ in self._muon}
        self._adam = [(name, value) for name, value in named if name not in chosen]
        self._momentum = {name: torch.zeros_like(value) for name, value in self._muon}
        self._rates = settings.learning_rate, settings.muon_rate
        self._decay = settings.weight_decay
        groups = [
            {"params": [v for n, v in self._adam if _is_decayed(n, v)], "weight_decay": self._decay},
            {"params": [v for n, v in self._adam if not _is_decayed(n, v)], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]] or [nn.Parameter(torch.zeros(1))],
            lr=self._rates[0],
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )

    def step(self, share: float) -> None:
        """Apply the gradients and drop them."""
        for group in self._adamw.param_groups:
            group["lr"] = self._rates[0] * share
        self._adamw.step()
        if self._muon:
            self._step_muon(self._rates[1] * share)
        for _, parameter in (*self._adam, *self._muon):
            parameter.grad = None

    @torch.no_grad()
    def _step_muon(self, rate: float) -> None:
        groups: dict[tuple[int, ...], list[tuple[str, nn.Parameter, Tensor]]] = {}
        for name, weight in self._muon:
            assert weight.grad is not None, "every matrix is used in every step"
            momentum = self._momentum[name]
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = weight.grad.lerp(momentum, MOMENTUM)
            groups.setdefault(tuple(weight.shape[-2:]), []).append((name, weight, update))
        for group in groups.values():
            matrices = [update.reshape(-1, *update.shape[-2:]) for _, _, update in group]
            directions = torch.split(self._orthogonal(torch.cat(matrices)), [len(each) for each in matrices])
            for (name, weight, _), direction in zip(group, directions, strict=True):
                outputs, inputs = weight.shape[-2:]
                if ".experts." in name:  # Hugging Face's float experts are [E, inputs, outputs]
                    outputs, inputs = inputs, outputs
                scale = rate * max(1.0, outputs / inputs) ** 0.5
                weight.mul_(1 - rate * self._decay).add_(direction.view_as(weight), alpha=-scale)

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        """[N, rows, columns]; each process of the run makes its share."""
        size, rank = self._world.size, self._world.rank
        if size == 1:
            return orthogonal(matrices)
        parts = torch.tensor_split(matrices, size)
        mine = torch.zeros(max(map(len, parts)), *matrices.shape[1:])
        if len(parts[rank]):
            mine[: len(parts[rank])] = orthogonal(parts[rank])
        found = self._world.gathered(mine)
        return torch.cat([each[: len(part)] for each, part in zip(found, parts, strict=True)])

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights, under names."""
        table = {f"muon.{name}": momentum for name, momentum in self._momentum.items()}
        for name, value in self._adam:
            for part, tensor in self._adamw.state.get(value, {}).items():
                table[f"adamw.{part}.{name}"] = tensor
        return table

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError when it is of another optimizer."""
        for name, momentum in self._momentum.items():
            momentum.copy_(state[f"muon.{name}"])
        for name, value in self._adam:
            if f"adamw.step.{name}" not in state:
                continue  # never had a gradient
            self._adamw.state[value] = {
                part: state[f"adamw.{part}.{name}"].to(value.device, copy=True)
                for part in ("step", "exp_avg", "exp_avg_sq")
            }


def _is_muon(name: str, value: Tensor) -> bool:
    is_bias = name.endswith("bias")  # experts' biases are [E, out], which is no matrix
    return value.ndim in (2, 3) and not is_bias and not any(part in name for part in _NOT_FOR_MUON)


def _is_decayed(name: str, value: Tensor) -> bool:
    """Matrices; not tables of vectors, whose rows may be without a gradient for long."""
    is_table = name.endswith(("embed_tokens.weight", "lm_head.weight", "bias"))
    return value.ndim >= 2 and not is_table


def orthogonal(matrices: Tensor) -> Tensor:
    """[..., rows, columns], singular values moved to about 1: five Newton-Schulz steps in bfloat16."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = (matrices.mT if is_tall else matrices).float()
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def rate_share(step: int, num_steps: int, settings: FinetuneSettings) -> float:
    """The share of the highest rate in a step from 0: a linear rise, then the schedule."""
    warmup = round(settings.warmup * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "wsd":
        left = (num_steps - step) / max(1.0, settings.decay * num_steps)
        return max(SMALLEST_RATE, min(1.0, left))
    done = (step - warmup) / max(1, num_steps - warmup)
    left = 0.5 + 0.5 * math.cos(math.pi * done) if settings.schedule == "cosine" else 1 - done
    return SMALLEST_RATE + (1 - SMALLEST_RATE) * left
