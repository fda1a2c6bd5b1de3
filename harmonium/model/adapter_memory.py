"""What LoRA adapters take of memory. Needs no kernels: an engine asks when one is to be loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from harmonium.checkpoint.model_config import ModelConfig


class SizedAdapter(Protocol):
    """What the plan must know of a LoRA adapter."""

    @property
    def nbytes(self) -> int: ...

    @property
    def max_rank(self) -> int: ...


def adapter_bytes(config: ModelConfig, adapters: Collection[SizedAdapter], max_batch_tokens: int) -> int:
    """The adapters, and for each token of a step its inner products with them and what its router gets."""
    if not adapters:
        return 0
    rank = max(adapter.max_rank for adapter in adapters)
    row = config.num_active_experts * rank + config.num_experts
    return sum(adapter.nbytes for adapter in adapters) + 4 * max_batch_tokens * row
