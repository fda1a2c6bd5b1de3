"""What lies between a layer's products, in Triton: norms, rotation, the cache's rows, the choice of experts.

In PyTorch each of these is ten or twenty kernels, and a decoding step of one token spends more time on them
than on its weights. Numbers are rounded where model.torch rounds them.

Dimension letters: docs/architecture.md; N the fused outputs of q, k and v.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmonium.model.torch_triton_experts import split_place

ROUTER_INPUTS, ROUTER_WARPS = 1024, 16
"""Of the program that scores a token's experts: many reads at a time, as it waits for memory."""


def add_norm(
    hidden_TD: Tensor, added_TXD: Tensor | None, weight_D: Tensor, eps: float, splits: bool = False
) -> tuple[Tensor, Tensor]:
    """(hidden_TD + the sum over X of added_TXD, its RMS norm), both in hidden_TD's dtype; None adds nothing.

    splits: give the norm as torch_triton_experts.split_blocks does.
    """
    T, D = hidden_TD.shape
    count = 0 if added_TXD is None else added_TXD.shape[1]
    new_TD = torch.empty_like(hidden_TD) if count else hidden_TD
    normed_TD = torch.empty_like(hidden_TD)
    _add_norm[(T,)](
        hidden_TD,
        hidden_TD if added_TXD is None else added_TXD.contiguous(),
        weight_D,
        new_TD,
        normed_TD,
        eps,
        D=D,
        COUNT=count,
        SPLITS=splits,
        SIZE=triton.next_power_of_2(D),
        num_warps=8 if D > 1024 else 4,
    )
    return new_TD, normed_TD


def rotate_and_store(
    fused_TN: Tensor,
    cos_TK2: Tensor,
    sin_TK2: Tensor,
    slot_T: Tensor,
    key_cache_NPGK: Tensor,
    value_cache_NPGK: Tensor,
    num_heads: int,
) -> Tensor:
    """Rotated queries [T, H, K]; rotated keys and the values go to their slots.

    fused_TN: queries, keys and values, one head after the other. slot_T: int64.
    """
    T, K = len(fused_TN), key_cache_NPGK.shape[-1]
    G = key_cache_NPGK.shape[-2]
    query_THK = fused_TN.new_empty((T, num_heads, K))
    _rotate_and_store[(T, num_heads + 2 * G)](
        fused_TN,
        cos_TK2,
        sin_TK2,
        slot_T,
        query_THK,
        key_cache_NPGK,
        value_cache_NPGK,
        H=num_heads,
        G=G,
        HALF=K // 2,
        SIZE=triton.next_power_of_2(K // 2),
        num_warps=1,
    )
    return query_THK


def choose_experts(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    """(chosen ids int32 [T, A], their weights float32 [T, A]), as model.torch_experts.Router chooses.

    x_TD: from torch_triton_experts.split_blocks.
    """
    T, D = x_TD.shape
    E = len(weight_ED)
    expert_id_TA = torch.empty((T, num_active), dtype=torch.int32, device=x_TD.device)
    weight_TA = torch.empty((T, num_active), dtype=torch.float32, device=x_TD.device)
    _choose_experts[(T,)](
        x_TD,
        weight_ED,
        bias_E,
        expert_id_TA,
        weight_TA,
        D=D,
        E=E,
        A=num_active,
        EXPERTS=triton.next_power_of_2(E),
        ACTIVE=triton.next_power_of_2(num_active),
        INPUTS=ROUTER_INPUTS,
        num_warps=ROUTER_WARPS,
    )
    return expert_id_TA, weight_TA


@triton.jit
def _add_norm(
    hidden,
    added,
    weight,
    new,
    normed,
    eps,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
) -> Any:
    """One row. A sum of several is rounded before it is added, as the experts' answer is."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, SIZE)
    is_there = d < D
    x_D = tl.load(hidden + row * D + d, mask=is_there, other=0.0).to(tl.float32)
    if COUNT > 0:
        sum_D = tl.zeros((SIZE,), tl.float32)
        for nth in tl.static_range(COUNT):
            at = (row * COUNT + nth) * D + d
            sum_D += tl.load(added + at, mask=is_there, other=0.0).to(tl.float32)
        sum_D = sum_D.to(new.dtype.element_ty).to(tl.float32)
        rounded_D = (x_D + sum_D).to(new.dtype.element_ty)
        tl.store(new + row * D + d, rounded_D, mask=is_there)
        x_D = rounded_D.to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(x_D * x_D) / D + eps)
    weight_D = tl.load(weight + d, mask=is_there, other=0.0).to(tl.float32)
    out_D = weight_D * (x_D * root)
    place_D = split_place(d) if SPLITS else d
    tl.store(normed + row * D + place_D, out_D.to(normed.dtype.element_ty), mask=is_there)


@triton.jit
def _rotate_and_store(
    fused,
    cos,
    sin,
    slots,
    query,
    key_cache,
    value_cache,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
) -> Any:
    """One head of one token: its two halves are turned, or a value is copied."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    j = tl.arange(0, SIZE)
    is_there = j < HALF
    at = (row * (H + 2 * G) + head) * (2 * HALF) + j
    first_J = tl.load(fused + at, mask=is_there, other=0.0).to(tl.float32)
    second_J = tl.load(fused + at + HALF, mask=is_there, other=0.0).to(tl.float32)
    if head < H + G:
        cos_J = tl.load(cos + row * HALF + j, mask=is_there, other=0.0)
        sin_J = tl.load(sin + row * HALF + j, mask=is_there, other=0.0)
        turned_J = first_J * cos_J - second_J * sin_J
        second_J = second_J * cos_J + first_J * sin_J
        first_J = turned_J
    first_out_J = first_J.to(query.dtype.element_ty)
    second_out_J = second_J.to(query.dtype.element_ty)
    if head < H:
        place = query + (row * H + head) * (2 * HALF) + j
    else:
        slot = tl.load(slots + row)
        if head < H + G:
            place = key_cache + (slot * G + head - H) * (2 * HALF) + j
        else:
            place = value_cache + (slot * G + head - H - G) * (2 * HALF) + j
    tl.store(place, first_out_J, mask=is_there)
    tl.store(place + HALF, second_out_J, mask=is_there)


@triton.jit
def _choose_experts(
    x,
    weight,
    bias,
    expert_id,
    expert_weight,
    D: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVE: tl.constexpr,
    INPUTS: tl.constexpr,
) -> Any:
    """Of one token. Of equals the lower id comes first; with a score that is NaN the weights are."""
    row = tl.program_id(0).to(tl.int64)
    e, a = tl.arange(0, EXPERTS), tl.arange(0, ACTIVE)
    is_expert = e < E
    score_E = tl.load(bias + e, mask=is_expert, other=0.0).to(tl.float32)
    sum_E = tl.zeros((EXPERTS,), tl.float32)
    for start in range(0, D, INPUTS):
        d = start + tl.arange(0, INPUTS)
        x_D = tl.load(x + row * D + split_place(d), mask=d < D, other=0.0).to(tl.float32)
        is_there = is_expert[:, None] & (d < D)[None, :]
        weight_ED = tl.load(weight + e[:, None] * D + d[None, :], mask=is_there, other=0.0).to(tl.float32)
        sum_E += tl.sum(weight_ED * x_D[None, :], axis=1)
    score_E += sum_E
    nothing = tl.sum(score_E, axis=0) * 0.0  # NaN where a score is
    score_E = tl.where(score_E == score_E, score_E, 0.0)
    score_E = tl.where(is_expert, score_E, float("-inf"))
    top_A = tl.full((ACTIVE,), float("-inf"), tl.float32)
    for nth in tl.static_range(A):
        best = tl.minimum(tl.argmax(score_E, axis=0, tie_break_left=True), E - 1)
        top_A = tl.where(a == nth, tl.max(score_E, axis=0), top_A)
        tl.store(expert_id + row * A + nth, best.to(tl.int32))
        score_E = tl.where(e == best, float("-inf"), score_E)
    share_A = tl.exp(top_A - tl.max(top_A, axis=0))
    share_A = share_A / tl.sum(share_A, axis=0) + nothing
    tl.store(expert_weight + row * A + a, share_A, mask=a < A)
