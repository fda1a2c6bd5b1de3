"""Seam B: whatever computes a step of the model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from harmonium.checkpoint.lora import LoraAdapter
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.model.batch import Batch, StepResult


class Runner(Protocol):
    """Computes one step over a flat batch; owns weights and the key/value cache, knows no requests.

    A cache block holds P = config.CACHE_BLOCK_TOKENS tokens of every layer of its kind ("full" or "window").
    Not thread-safe: one caller at a time.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens a step may hold: the scratch was made for it."""
        ...

    def allocate_cache(self, num_full_blocks: int, num_window_blocks: int) -> None:
        """Take the cache's memory. Called once, before the first step."""
        ...

    def step(self, batch: Batch) -> StepResult:
        """Write keys and values of the batch's tokens to their slots, compute, sample."""
        ...

    def close(self) -> None:
        """Give memory and maps back. A second call does nothing."""
        ...


@runtime_checkable
class AdapterRunner(Runner, Protocol):
    """A runner whose LoRA adapters may change between two steps."""

    def set_adapter(self, index: int, adapter: LoraAdapter | None) -> None:
        """Put an adapter at a place that batches name it by; None gives the one that is there back.

        No batch may name an empty place. The next free place may be one above all those used so far.
        """
        ...
