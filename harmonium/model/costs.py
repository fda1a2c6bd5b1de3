"""What a step must read and compute at the least: the yardstick that speeds are held against.

A step takes no less time than its bytes over the machine's read bandwidth, nor than its operations over the
machine's operations a second (a roofline). Counted are the weights, each read once a step, and the keys and
values in the cache; activations, norms and attention's own products are not, so the true limit is a little
lower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from harmonium.checkpoint.model_config import ModelConfig
from harmonium.config import KvCache, Weights

ExpertFormat = Literal["mxfp4", "bf16"]
Bound = Literal["bandwidth", "operations"]

BLOCK = 32
"""Values that share a scale: in MXFP4 (one byte of scale), int8 weights and int8 caches (two bytes)."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """bytes: read at the least. operations: multiplications and additions, so 2 for each weight and token."""

    bytes: float
    operations: float

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(self.bytes + other.bytes, self.operations + other.operations)

    def least_seconds(self, bytes_per_second: float, operations_per_second: float) -> float:
        """The time that neither bandwidth nor arithmetic allows to undercut."""
        return max(self.bytes / bytes_per_second, self.operations / operations_per_second)

    def bound(
        self, bytes_per_second: float, operations_per_second: float
    ) -> Literal["bandwidth", "operations"]:
        """Which of the two is the limit."""
        by_bytes = self.bytes / bytes_per_second >= self.operations / operations_per_second
        return "bandwidth" if by_bytes else "operations"


def step_cost(
    config: ModelConfig,
    weights: Weights,
    *,
    num_tokens: int,
    num_sequences: int,
    num_logit_rows: int,
    context: float,
    experts: ExpertFormat = "mxfp4",
    kv_cache: KvCache = "bf16",
    screens_logits: bool = False,
) -> StepCost:
    """Of one step: num_tokens in all, of num_sequences that have `context` tokens each in the cache.

    screens_logits: the unembedding's low halves are not read (model/unembedding.py).

    Experts are taken to be chosen independently and evenly: T tokens then meet E * (1 - (1 - A/E)^T) of them
    in a layer on average.
    """
    attention = _attention_weights(config)
    router = config.num_experts * config.hidden_size
    expert = 3 * config.hidden_size * config.expert_size
    unembedding = config.vocabulary_size * config.hidden_size if num_logit_rows else 0
    num_experts, active = config.num_experts, config.num_active_experts
    experts_read = num_experts * (1 - (1 - active / num_experts) ** num_tokens)
    layer_bytes = (
        attention * _dense_bytes(weights)
        + router * 2
        + experts_read * expert * (17 / BLOCK if experts == "mxfp4" else 2)
    )
    cache_bytes = num_sequences * _cache_bytes(config, context, kv_cache)
    per_token = config.num_layers * (attention + router + active * expert)
    unembedding_bytes = unembedding * (_dense_bytes(weights) - 0.5 * screens_logits)
    return StepCost(
        bytes=config.num_layers * layer_bytes + unembedding_bytes + cache_bytes,
        operations=2.0 * (num_tokens * per_token + num_logit_rows * unembedding),
    )


def prefill_cost(
    config: ModelConfig,
    weights: Weights,
    num_tokens: int,
    chunk: int,
    experts: ExpertFormat = "mxfp4",
    kv_cache: KvCache = "bf16",
) -> StepCost:
    """Of a prompt alone, computed in chunks; logits for its last token only."""
    total = StepCost(0.0, 0.0)
    for start in range(0, num_tokens, chunk):
        end = min(start + chunk, num_tokens)
        total += step_cost(
            config,
            weights,
            num_tokens=end - start,
            num_sequences=1,
            num_logit_rows=int(end == num_tokens),
            context=start,
            experts=experts,
            kv_cache=kv_cache,
        )
    return total


def _dense_bytes(weights: Weights) -> float:
    return 1 + 2 / BLOCK if weights == "int8" else 2.0


def _attention_weights(config: ModelConfig) -> int:
    query = config.num_heads * config.head_size
    return config.hidden_size * (2 * query + 2 * config.num_kv_heads * config.head_size)


def cached_row_bytes(head_size: int, kv_cache: KvCache) -> int:
    """One head's key, or value, of one position: 2 bytes a number, or 1 and a bf16 scale per 32."""
    return 2 * head_size if kv_cache == "bf16" else head_size + 2 * math.ceil(head_size / BLOCK)


def _cache_bytes(config: ModelConfig, context: float, kv_cache: KvCache) -> float:
    """Keys and values that a sequence's next token looks at, in all layers."""
    per_token = 2 * config.num_kv_heads * cached_row_bytes(config.head_size, kv_cache)
    windows = sum(kind == "window" for kind in config.layer_kinds)
    full = len(config.layer_kinds) - windows
    return per_token * (full * context + windows * min(context, config.window))
