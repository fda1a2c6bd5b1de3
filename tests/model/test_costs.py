from __future__ import annotations

from dataclasses import replace

import pytest

from harmonium.checkpoint.model_config import ModelConfig, RopeConfig
from harmonium.model.costs import StepCost, prefill_cost, step_cost

GPT_OSS_20B = ModelConfig(
    num_layers=24,
    hidden_size=2880,
    expert_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_size=64,
    num_experts=32,
    num_active_experts=4,
    vocabulary_size=201_088,
    window=128,
    max_context=131_072,
    layer_kinds=("window", "full") * 12,
    rope=RopeConfig(150_000.0, 32.0, 32.0, 1.0, 4096, False),
    rms_norm_eps=1e-5,
    swiglu_limit=7.0,
)


def decode(batch: int, context: float = 0.0) -> StepCost:
    return step_cost(
        GPT_OSS_20B, "int8", num_tokens=batch, num_sequences=batch, num_logit_rows=batch, context=context
    )


def test_decode_of_the_20b_reads_what_its_tensors_hold() -> None:
    attention = 24 * (2880 * 4096 * 2 + 2880 * 512 * 2) * 34 / 32
    unembedding = 201_088 * 2880 * 34 / 32
    experts = 24 * 4 * 3 * 2880 * 2880 * 17 / 32
    router = 24 * 32 * 2880 * 2
    assert decode(1).bytes == pytest.approx(attention + unembedding + experts + router)
    assert decode(1).bytes == pytest.approx(2.56e9, rel=0.01)


def test_more_sequences_read_more_experts_but_never_more_than_there_are() -> None:
    sizes = [decode(batch).bytes for batch in (1, 2, 4, 8, 16, 1000)]
    assert sizes == sorted(sizes)
    all_experts = 24 * 32 * 3 * 2880 * 2880 * 17 / 32
    assert sizes[-1] - sizes[0] == pytest.approx(all_experts * 28 / 32, rel=1e-6)


def test_cache_counts_the_window_only_once_it_is_full() -> None:
    per_token = 2 * 2 * 8 * 64
    assert decode(1, 100).bytes - decode(1).bytes == pytest.approx(24 * 100 * per_token)
    assert decode(3, 4096).bytes - decode(3).bytes == pytest.approx(3 * 12 * (4096 + 128) * per_token)


def test_prefill_is_two_operations_a_weight_a_token() -> None:
    cost = prefill_cost(GPT_OSS_20B, "int8", 512, 512)
    assert cost.operations / 512 == pytest.approx(6.06e9, rel=0.01)
    in_chunks = prefill_cost(GPT_OSS_20B, "int8", 512, 128)
    assert in_chunks.operations == pytest.approx(cost.operations)
    assert in_chunks.bytes > 3 * cost.bytes


def test_limit_is_the_slower_of_bandwidth_and_arithmetic() -> None:
    cost = StepCost(bytes=20e9, operations=300e9)
    assert cost.least_seconds(10e9, 100e9) == 3.0
    assert cost.bound(10e9, 100e9) == "operations"
    assert cost.least_seconds(5e9, 100e9) == 4.0
    assert cost.bound(5e9, 100e9) == "bandwidth"


def test_formats_change_the_bytes_and_not_the_operations() -> None:
    exact = step_cost(
        replace(GPT_OSS_20B, vocabulary_size=64),
        "bf16",
        num_tokens=1,
        num_sequences=1,
        num_logit_rows=1,
        context=0,
        experts="bf16",
    )
    per_token = 24 * (2880 * 4096 * 2 + 2880 * 512 * 2 + 32 * 2880 + 4 * 3 * 2880 * 2880) + 64 * 2880
    assert exact.bytes == pytest.approx(2 * per_token)
    assert exact.operations == pytest.approx(2 * per_token)
