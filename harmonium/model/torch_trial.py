"""A trial before a GPU is trusted: what was chosen computes small inputs, and plain PyTorch on the CPU too.

Kernels and libraries fail in their own ways on a machine: no compiler for Triton's launcher, a build for
another card, a wrong result. Better one line that says what was passed over than a wrong answer.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from harmonium.checkpoint.model_config import ModelConfig, RopeConfig
from harmonium.config import CACHE_BLOCK_TOKENS, DeviceSetting
from harmonium.model.attention import TRITON_EXPERTS, AttentionChoice, Device, choose_attention
from harmonium.model.torch_backends import GATHERED, eager
from harmonium.model.torch_device import probe_case, torch_device
from harmonium.model.torch_experts import Experts

_HEADS, _GROUPS, _SIZE, _WINDOW, _BLOCKS = 16, 2, 64, 48, 3

_TOLERANCE = {"float32": 2e-4, "bfloat16": 2**-5}
"""Of numbers of order 1. A wrong mask or a sink left out is off by ten times as much."""


def choose_for_machine(name: str, setting: DeviceSetting) -> AttentionChoice:
    """model.attention's choice for the device that is here; on a GPU one that has passed its trial.

    Raises ConfigError for a device that is not there, or a forced implementation that fails.
    """
    case = probe_case(setting)
    while True:
        choice = choose_attention(name, case)
        if case.device.kind == "cpu" or choice.name == "eager":
            break
        trouble = try_attention(choice.name, case.device, choice.dtype)
        if trouble is None:
            break
        case = replace(case, failed={**case.failed, choice.name: trouble})
    if choice.has_triton_experts and case.device.kind != "cpu":
        trouble = try_experts(case.device, choice.dtype)
        if trouble is not None:
            case = replace(case, failed={**case.failed, TRITON_EXPERTS: trouble})
            choice = choose_attention(name, case)
    return choice


def try_attention(name: str, device: Device, dtype: str) -> str | None:
    """Why it cannot be trusted there; None: it gave what plain PyTorch gives on the CPU, to rounding."""
    try:
        for num_queries in (1, 24):
            for window in (0, _WINDOW):
                inputs = _attention_inputs(num_queries, getattr(torch, dtype))
                found = _attend(name, [tensor.to(torch_device(device)) for tensor in inputs], window)
                query, key, value, sink = (tensor.float() for tensor in inputs)
                expected = eager(query, key, value, sink, window, _SIZE**-0.5)
                trouble = _difference(found, expected, dtype)
                if trouble is not None:
                    return trouble
    except Exception as error:  # a library's kernels fail in many ways
        return _said(error)
    return None


def try_experts(device: Device, dtype: str) -> str | None:
    """The same of our Triton kernels for MXFP4 experts."""
    try:
        experts = _random_experts(getattr(torch, dtype))
        triton_experts = import_module("harmonium.model.torch_triton_experts").triton_experts
        for num_tokens in (1, 48):
            generator = torch.Generator().manual_seed(num_tokens)
            x_TD = torch.randn(num_tokens, 96, generator=generator).to(getattr(torch, dtype))
            expert_id_TA = torch.randint(4, (num_tokens, 2), generator=generator)
            weight_TA = torch.rand(num_tokens, 2, generator=generator)
            expected = experts.float()(x_TD.float(), expert_id_TA, weight_TA)
            there = torch_device(device)
            arguments = (tensor.to(there) for tensor in (x_TD, expert_id_TA, weight_TA))
            found = triton_experts(experts.to(there, getattr(torch, dtype)), *arguments)
            experts.cpu()
            trouble = _difference(found, expected, dtype)
            if trouble is not None:
                return trouble
    except Exception as error:  # Triton's compiler and launcher too
        return _said(error)
    return None


def _attention_inputs(num_queries: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values, sinks: the last queries of three blocks of positions but for a few."""
    generator = torch.Generator().manual_seed(num_queries)
    num_keys = _BLOCKS * CACHE_BLOCK_TOKENS - 5
    shapes = (num_queries, _HEADS, _SIZE), (num_keys, _GROUPS, _SIZE), (num_keys, _GROUPS, _SIZE), (_HEADS,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _attend(name: str, inputs: list[Tensor], window: int) -> Tensor:
    query_QHK, key_SGK, value_SGK, sink_H = inputs
    if name in GATHERED:
        return GATHERED[name](query_QHK, key_SGK, value_SGK, sink_H, window, _SIZE**-0.5)
    paged = import_module("harmonium.model.torch_triton_attention")
    Q, S = len(query_QHK), len(key_SGK)
    caches = [key_SGK.new_zeros((_BLOCKS, CACHE_BLOCK_TOKENS, _GROUPS, _SIZE)) for _ in range(2)]
    for cache, rows in zip(caches, (key_SGK, value_SGK), strict=True):
        cache.flatten(0, 1)[:S] = rows
    tiles = paged.lay_out(
        np.arange(S - Q, S, dtype=np.int32),
        np.array([0, Q], np.int32),
        np.arange(_BLOCKS, dtype=np.int32)[None],
        window,
        _HEADS,
        _GROUPS,
        query_QHK.device,
    )
    mixed: Tensor = paged.paged_attention(query_QHK, *caches, sink_H, tiles, _SIZE**-0.5)
    return mixed


def _random_experts(dtype: torch.dtype) -> Experts:
    rope = RopeConfig(
        theta=1e4, factor=1.0, beta_fast=32.0, beta_slow=1.0, original_context=4096, truncate=False
    )
    config = ModelConfig(
        num_layers=1,
        hidden_size=96,
        expert_size=64,
        num_heads=_HEADS,
        num_kv_heads=_GROUPS,
        head_size=_SIZE,
        num_experts=4,
        num_active_experts=2,
        vocabulary_size=32,
        window=_WINDOW,
        max_context=4096,
        layer_kinds=("full",),
        rope=rope,
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
    )
    experts, generator = Experts(config, dtype, packed=True).requires_grad_(False), torch.Generator()
    for name, buffer in experts.named_buffers():
        low, high = (0, 256) if name.endswith("blocks") else (122, 126)  # of order 0.1
        buffer.copy_(torch.randint(low, high, buffer.shape, generator=generator))
    for bias in experts.parameters():
        bias.copy_(torch.randn(bias.shape, generator=generator))
    return experts


def _difference(found: Tensor, expected: Tensor, dtype: str) -> str | None:
    largest = float((found.float().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if largest <= _TOLERANCE[dtype]:  # NaN is not
        return None
    return f"its result was off by {largest:.2g} of {_TOLERANCE[dtype]:.2g} allowed"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
