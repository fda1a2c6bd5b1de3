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

from harmonium.finetune.settings import FinetuneSettings

BETAS, EPSILON = (0.9, 0.95), 1e-10
MOMENTUM, ITERATIONS = 0.95, 5
SMALLEST_RATE = 0.02
"""Share of the highest rate that cosine and linear schedules end at."""

_NOT_FOR_MUON = ("embed_tokens", "lm_head", "router")

Named = Sequence[tuple[str, nn.Parameter]]


class Optimizer:
    """AdamW, and Muon where asked for; `step` takes the share of the highest rates that is due."""

    def __init__(self, named: Named, settings: FinetuneSettings) -> None:
        uses_muon = settings.optimizer == "muon"
        self._muon = [(name, value) for name, value in named if uses_muon and _is_muon(name, value)]
        chosen = {name for name, _ in self._muon}
        self._adam = [(name, value) for name, value in named if name not in chosen]
        self._momentum = {name: torch.zeros_like(value) for name, value in self._muon}
        self._rates = settings.learning_rate, settings.muon_rate
        self._decay = settings.weight_decay
        groups = [
            {"params": [value for _, value in self._adam if value.ndim >= 2], "weight_decay": self._decay},
            {"params": [value for _, value in self._adam if value.ndim < 2], "weight_decay": 0.0},
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
        for name, weight in self._muon:
            assert weight.grad is not None, "every matrix is used in every step"
            momentum = self._momentum[name]
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = orthogonal(weight.grad.lerp(momentum, MOMENTUM))
            rows, columns = weight.shape[-2:]
            scale = rate * max(1.0, rows / columns) ** 0.5
            weight.mul_(1 - rate * self._decay).add_(update, alpha=-scale)

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
                part: state[f"adamw.{part}.{name}"].clone() for part in ("step", "exp_avg", "exp_avg_sq")
            }


def _is_muon(name: str, value: Tensor) -> bool:
    is_bias = name.endswith("bias")  # experts' biases are [E, out], which is no matrix
    return value.ndim in (2, 3) and not is_bias and not any(part in name for part in _NOT_FOR_MUON)


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
    done = (step - warmup) / max(1, num_steps - warmup)
    left = 0.5 + 0.5 * math.cos(math.pi * done) if settings.schedule == "cosine" else 1 - done
    return SMALLEST_RATE + (1 - SMALLEST_RATE) * left
