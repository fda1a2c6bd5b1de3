"""What serving with PyTorch takes, from the native plan. Pure; needs no PyTorch."""

from __future__ import annotations

from dataclasses import replace

from harmonium.checkpoint.model_config import ModelConfig
from harmonium.config import EngineConfig
from harmonium.errors import MemoryPlanError
from harmonium.model.memory import MemoryPlan, dense_bytes, expert_bytes, plan_memory

TORCH_BYTES = 250 << 20
"""PyTorch's libraries and its allocator. `import torch` adds MEASURED (2.13, CPU build)."""

_TILES_BYTES = 160 << 20
"""Scores of a tile of attention and their copies, the cross entropy of a few rows."""


def plan_torch_memory(
    config: ModelConfig, expert_format: str, engine_config: EngineConfig, memory_limit_bytes: int
) -> MemoryPlan:
    """The plan for model.torch_runner: float32 weights and cache, MXFP4 experts in the map, bf16 ones copied.

    Raises ConfigError and MemoryPlanError as `plan_memory` does.
    """
    native = replace(engine_config, weights="bf16", experts="mapped")
    dense = 2 * dense_bytes(config, "bf16")
    table = 4 * config.vocabulary_size * config.hidden_size
    experts = expert_bytes(config, expert_format) * (2 if expert_format == "bf16" else 1)
    active = 4 * 6 * config.num_active_experts * config.expert_size * engine_config.max_batch_tokens
    # One expert is float32 at a time.
    matrix = 4 * 2 * config.expert_size * config.hidden_size
    logits = 4 * config.vocabulary_size * engine_config.max_sequences
    extra = dense - dense_bytes(config, "bf16") + table + TORCH_BYTES + _TILES_BYTES
    plan = plan_memory(config, expert_format, native, max(1, memory_limit_bytes - extra))
    plan = replace(
        plan,
        expert_bytes=experts,
        dense_bytes=dense,
        embedding_bytes=table,
        full_cache_bytes=2 * plan.full_cache_bytes,
        window_cache_bytes=2 * plan.window_cache_bytes,
        scratch_bytes=plan.scratch_bytes + _TILES_BYTES + active + matrix + logits,
        process_bytes=plan.process_bytes + TORCH_BYTES,
        limit_bytes=memory_limit_bytes,
    )
    if plan.total_bytes > memory_limit_bytes:
        raise MemoryPlanError(
            f"with PyTorch the model needs {plan.total_bytes / 1e9:.2f} GB and this process may use "
            f"{memory_limit_bytes / 1e9:.2f} GB; the native engine needs less, and so does a shorter "
            f"context_length than {plan.context_length:,}"
        )
    return plan
