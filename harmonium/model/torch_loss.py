"""Losses of training, in PyTorch: next-token cross entropy without a table of logits, and balanced experts.

Dimension letters: R rows, D model width, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 1 << 25
"""Logits in memory at once: 128 MB in float32, so 166 rows of the real vocabulary."""


def cross_entropy(hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, weight_R: Tensor) -> Tensor:
    """sum(weight_R * -log p(target_R)) as a float32 number, for logits hidden_RD @ weight_VD.T.

    target_R: int64. weight_R: float32, what each row counts; the caller divides by the number of tokens.
    Logits are made for a few rows at a time and their gradient with them, so that nothing of size R * V is
    ever in memory. Differentiable in hidden_RD and weight_VD; the backward pass may run once.
    """
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_RD, weight_VD, target_R, weight_R
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, target_R: Tensor, weight_R: Tensor) -> Tensor:
        total = hidden_RD.new_zeros((), dtype=torch.float32)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_RD) if wants_hidden else None
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        size = max(1, LOGITS_AT_ONCE // len(weight_VD))
        for start in range(0, len(hidden_RD), size):
            rows = slice(start, start + size)
            logits_RV = (hidden_RD[rows] @ weight_VD.T).float()
            log_total_R = logits_RV.logsumexp(dim=-1)
            target_R1 = target_R[rows, None]
            total += (weight_R[rows] * (log_total_R - logits_RV.gather(1, target_R1)[:, 0])).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            # d loss / d logits = softmax - one at the target.
            slope_RV = logits_RV.sub_(log_total_R[:, None]).exp_()
            slope_RV.scatter_add_(1, target_R1, torch.full_like(target_R1, -1, dtype=torch.float32))
            slope_RV.mul_(weight_R[rows, None])
            if hidden_grad is not None:
                hidden_grad[rows] = slope_RV.to(weight_VD.dtype) @ weight_VD
            if weight_grad is not None:
                weight_grad += slope_RV.T @ hidden_RD[rows].float()
        ctx.hidden_grad, ctx.weight_grad, ctx.weight_dtype = hidden_grad, weight_grad, weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        assert hidden_grad is not None or weight_grad is not None, "cross_entropy's backward pass ran before"
        ctx.hidden_grad = ctx.weight_grad = None
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(grads[0].to(hidden_grad.dtype))
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grads[0]).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


def load_balancing_loss(score_TE: Sequence[Tensor], num_active: int) -> Tensor:
    """E * sum over experts of (share of the choices * mean probability), the mean over the layers' scores.

    1 when `num_active` is 1 and all experts are alike, num_active times that in general; more when some are
    preferred. score_TE: the router's scores of each layer. Source: Switch Transformer, arXiv 2101.03961,
    equations 4 to 6; Transformers' load_balancing_loss_func puts the layers together before multiplying.
    """
    losses = []
    for scores in score_TE:
        num_experts = scores.shape[-1]
        chosen = scores.topk(num_active, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=num_experts).float() / len(scores)
        losses.append(num_experts * (share_E * scores.softmax(dim=-1).mean(dim=0)).sum())
    return torch.stack(losses).mean()
