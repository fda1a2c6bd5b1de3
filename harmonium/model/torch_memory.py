"""What serving with PyTorch takes, from the native plan. Pure; needs no PyTorch."""

from __future__ import annotations

from dataclasses import replace

from harmonium.checkpoint.model_config import ModelConfig
from harmonium.config import EngineConfig
from harmonium.errors import MemoryPlanError
from harmonium.model.attention import AttentionChoice
from harmonium.model.memory import MemoryPlan, dense_bytes, expert_bytes, plan_memory

TORCH_BYTES = 250 << 20
"""PyTorch's libraries and its allocator. `import torch` adds MEASURED (2.13, CPU build)."""

DEVICE_BYTES = 1 << 30
"""A GPU's context, libraries and what its allocator keeps back. A guess: it was not measured."""

_NO_LIMIT_BYTES = 1 << 60

_TILES_BYTES = 160 << 20
"""Scores of a tile of attention and their copies, the cross entropy of a few rows."""


def plan_torch_memory(
    config: ModelConfig,
    expert_format: str,
    engine_config: EngineConfig,
    memory_limit_bytes: int,
    attention: AttentionChoice,
) -> MemoryPlan:
    """The plan for model.torch_runner: weights and cache in the device's dtype, MXFP4 experts as they are.

    On a GPU all of it is the card's memory, and the limit is what is free there. Raises ConfigError and
    MemoryPlanError as `plan_memory` does.
    """
    device, width = attention.device, 4 if attention.dtype == "float32" else 2
    if device.kind != "cpu":
        # A limit that was asked for counts; without one the card's memory does, not the machine's.
        memory_limit_bytes = engine_config.memory_limit_bytes or device.free_bytes
    torch_bytes = TORCH_BYTES if device.kind == "cpu" else DEVICE_BYTES
    native = replace(engine_config, weights="bf16", experts="mapped")
    dense = dense_bytes(config, "bf16") * width // 2
    table = width * config.vocabulary_size * config.hidden_size
    experts = expert_bytes(config, expert_format) * (width // 2 if expert_format == "bf16" else 1)
    active = 4 * 6 * config.num_active_experts * config.expert_size * engine_config.max_batch_tokens
    # One expert is float at a time.
    matrix = 4 * 2 * config.expert_size * config.hidden_size
    logits = 4 * config.vocabulary_size * engine_config.max_sequences
    extra = dense - dense_bytes(config, "bf16") + table + torch_bytes + _TILES_BYTES
    try:
        plan = plan_memory(config, expert_format, native, memory_limit_bytes - extra)
    except MemoryPlanError:
        # Its figures are those of the native engine: count ours, and refuse below.
        plan = plan_memory(config, expert_format, replace(native, max_sequences=1), _NO_LIMIT_BYTES)
    plan = replace(
        plan,
        expert_bytes=experts,
        dense_bytes=dense,
        embedding_bytes=table,
        full_cache_bytes=plan.full_cache_bytes * width // 2,
        window_cache_bytes=plan.window_cache_bytes * width // 2,
        scratch_bytes=plan.scratch_bytes + _TILES_BYTES + active + matrix + logits,
        process_bytes=plan.process_bytes + torch_bytes,
        limit_bytes=memory_limit_bytes,
    )
    if plan.total_bytes > memory_limit_bytes:
        where = "this process may use" if device.kind == "cpu" else f"{device.name or device} has"
        raise MemoryPlanError(
            f"with PyTorch the model needs {plan.total_bytes / 1e9:.2f} GB and {where} "
            f"{memory_limit_bytes / 1e9:.2f} GB; the native engine needs less, and so does a shorter "
            f"context_length than {plan.context_length:,}"
        )
    return plan
