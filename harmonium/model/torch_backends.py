"""Attention of one sequence by the libraries that have no sinks, made right, and by our own plain PyTorch.

Each takes the queries of the last Q of S positions, with their keys and values gathered:

    mixed_QHK = GATHERED["sdpa"](query_QHK, key_SGK, value_SGK, sink_H, window, scale)

window: positions that a query sees, its own included; 0: all before it. The first position may be in the
middle of the sequence, if no query sees what comes before. The table of what runs where: model/attention.py.

Dimension letters: Q queries, S keys, H query heads, G key/value heads, R = H/G, K head size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harmonium.model.torch_attention import sink_attention

Gathered = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]

_SPARE_SIZE = 8
"""Numbers that the extra key adds to a head. Two would do; kernels want multiples of 8."""


def with_sink(out_QHK: Tensor, lse_HQ: Tensor, sink_H: Tensor) -> Tensor:
    """Attention without sinks -> with them: out * exp(lse) / (exp(lse) + exp(sink)), which is exact.

    lse_HQ: natural logarithm of the sum of the exponentials of a query's scaled scores.
    """
    share_HQ = torch.sigmoid(lse_HQ.float() - sink_H.float()[:, None])
    return (out_QHK.float() * share_HQ.T[..., None]).to(out_QHK.dtype)


def eager(
    query_QHK: Tensor, key_SGK: Tensor, value_SGK: Tensor, sink_H: Tensor, window: int, scale: float
) -> Tensor:
    """torch_attention.sink_attention: sinks and windows are its own."""
    last_Q = _last_rows(len(query_QHK), len(key_SGK), query_QHK.device)
    first_Q = (last_Q - window + 1).clamp_(min=0) if window else torch.zeros_like(last_Q)
    return sink_attention(query_QHK, key_SGK, value_SGK, sink_H, first_Q, last_Q, scale)


def sdpa(
    query_QHK: Tensor, key_SGK: Tensor, value_SGK: Tensor, sink_H: Tensor, window: int, scale: float
) -> Tensor:
    """scaled_dot_product_attention, which gives no log-sum-exp: the sink is key 0, seen by every query.

    Heads are longer by a few numbers, in which key 0 alone is not zero: its product with a query is the sink,
    its value is zero. Heads of a group are rows of one product, so that no kernel must know of groups.
    """
    Q, H, K = query_QHK.shape
    S, G, _ = key_SGK.shape
    spare = _SPARE_SIZE + -K % _SPARE_SIZE
    query_QHJ = functional.pad(query_QHK, (0, spare))
    query_QHJ[..., K : K + 2] = sink_H[:, None]
    key_ZGJ = functional.pad(key_SGK, (0, spare, 0, 0, 1, 0))
    # 1/scale in two numbers: one of bf16 would be off by 0.4 % where the scale is no power of two.
    high = torch.tensor(1 / scale, dtype=key_SGK.dtype).item()
    key_ZGJ[0, :, K], key_ZGJ[0, :, K + 1] = high, 1 / scale - high
    value_ZGJ = functional.pad(value_SGK, (0, spare, 0, 0, 1, 0))
    rows_GNJ = query_QHJ.view(Q, G, H // G, -1).permute(1, 2, 0, 3).reshape(1, G, H // G * Q, -1)
    seen_NZ = None
    if Q > 1 or (window and window < S):
        seen_QZ = functional.pad(_visible(Q, S, window, query_QHK.device), (1, 0), value=True)
        seen_NZ = seen_QZ.repeat(H // G, 1)
    mixed_GNJ = functional.scaled_dot_product_attention(
        rows_GNJ,
        key_ZGJ.transpose(0, 1)[None],
        value_ZGJ.transpose(0, 1)[None],
        attn_mask=seen_NZ,
        scale=scale,
    )
    # Kernels lay their result out differently.
    return mixed_GNJ.reshape(H, Q, -1)[..., :K].transpose(0, 1)


def flex(
    query_QHK: Tensor, key_SGK: Tensor, value_SGK: Tensor, sink_H: Tensor, window: int, scale: float
) -> Tensor:
    """flex_attention, compiled on CUDA. Plain on the CPU, where it holds all scores: for tests."""
    Q, S, device = len(query_QHK), len(key_SGK), query_QHK.device
    attend, mask = _flex(device.type)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, auxiliary = attend(
            query_QHK.transpose(0, 1)[None],
            key_SGK.transpose(0, 1)[None],
            value_SGK.transpose(0, 1)[None],
            block_mask=mask(_sees(S - Q, window or S), None, None, Q, S, device=device),
            scale=scale,
            enable_gqa=True,
            kernel_options=_flex_options(Q, device),
            return_aux=_flex_module().AuxRequest(lse=True),
        )
    return with_sink(out[0].transpose(0, 1), auxiliary.lse[0], sink_H)


def flash2(
    query_QHK: Tensor, key_SGK: Tensor, value_SGK: Tensor, sink_H: Tensor, window: int, scale: float
) -> Tensor:
    """FlashAttention 2. Source of the arguments' meaning: the docstrings of Dao-AILab/flash-attention."""
    return _flash("flash_attn", query_QHK, key_SGK, value_SGK, sink_H, window, scale)


def flash3(
    query_QHK: Tensor, key_SGK: Tensor, value_SGK: Tensor, sink_H: Tensor, window: int, scale: float
) -> Tensor:
    """FlashAttention 3, which is another package with the same arguments."""
    return _flash("flash_attn_interface", query_QHK, key_SGK, value_SGK, sink_H, window, scale)


GATHERED: Mapping[str, Gathered] = {
    "eager": eager,
    "sdpa": sdpa,
    "flex": flex,
    "flash2": flash2,
    "flash3": flash3,
}


def _flash(
    package: str,
    query_QHK: Tensor,
    key_SGK: Tensor,
    value_SGK: Tensor,
    sink_H: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    # Causal there means that the last query sees the last key, as here. A window (n, 0) is n + 1 positions.
    out, lse, *_ = import_module(package).flash_attn_func(
        query_QHK[None],
        key_SGK[None],
        value_SGK[None],
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        return_attn_probs=True,
    )
    return with_sink(out[0], lse[0], sink_H)


def _last_rows(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    return torch.arange(num_keys - num_queries, num_keys, device=device)


def _visible(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """bool [Q, S]: what each query sees."""
    row_Q1 = _last_rows(num_queries, num_keys, device)[:, None]
    key_S = torch.arange(num_keys, device=device)
    return (key_S <= row_Q1) & (key_S > row_Q1 - (window or num_keys))


def _sees(offset: int, window: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query + offset) & (key > query + offset - window)

    return sees


def _flex_options(num_queries: int, device: torch.device) -> dict[str, bool] | None:
    """PyTorch 2.11 cannot compile its kernel for few queries for any number of them: take the other one."""
    if device.type == "cpu" or num_queries == 1:
        return None
    return {"FORCE_USE_FLEX_ATTENTION": True}


def _flex_module() -> Any:
    return import_module("torch.nn.attention.flex_attention")


@cache
def _flex(device_type: str) -> tuple[Any, Any]:
    """(flex_attention, create_block_mask) for a device; compiled for all lengths at once, on CUDA."""
    module = _flex_module()
    if device_type == "cpu":
        return module.flex_attention, module.create_block_mask
    return torch.compile(module.flex_attention, dynamic=True), module.create_block_mask
