from dataclasses import replace
from typing import Any

import pytest

from harmonium.checkpoint.model_config import ModelConfig
from harmonium.config import CACHE_BLOCK_TOKENS, EngineConfig
from harmonium.errors import ConfigError, MemoryPlanError
from harmonium.model.memory import MemoryPlan, block_bytes, plan_memory
from harmonium.testing import tiny_config

GB = 1_000_000_000
GPT_OSS_20B = tiny_config(
    num_layers=24,
    hidden_size=2880,
    expert_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_size=64,
    num_experts=32,
    num_active_experts=4,
    window=128,
)


def plan(limit_bytes: int = 64 * GB, config: ModelConfig = GPT_OSS_20B, **settings: Any) -> MemoryPlan:
    settings.setdefault("experts", "mapped")
    return plan_memory(config, "mxfp4", EngineConfig(**settings), limit_bytes, threads=2)


def test_20b_at_8192_tokens_stays_below_14_gb() -> None:
    chosen = plan()
    assert chosen.context_length == 8192
    assert chosen.total_bytes <= 14 * GB


def test_weights_of_20b_are_counted_as_they_lie() -> None:
    chosen = plan()
    # 24 layers x 32 experts x (5760 x 90 + 2880 x 90) blocks of 17 bytes.
    assert chosen.expert_bytes == 24 * 32 * (5760 + 2880) * 90 * 17
    # qkv 5120 x 2880, out 2880 x 4096, unembedding 201,088 x 2880: 34 bytes per 32 weights, and small
    # tensors.
    matrices = (24 * (5120 * 2880 + 2880 * 4096) + 201_088 * 2880) * 34 // 32
    assert matrices < chosen.dense_bytes < matrices + 20_000_000
    assert plan(weights="bf16").dense_bytes > 1.8 * chosen.dense_bytes


def test_total_is_the_sum_of_the_parts() -> None:
    chosen = plan()
    parts = [getattr(chosen, name) for name in MemoryPlan.__slots__ if name.endswith("_bytes")]
    assert chosen.total_bytes == sum(parts) - chosen.limit_bytes


def test_cache_holds_one_context_at_least_and_a_few_when_memory_allows() -> None:
    one = 8192 // CACHE_BLOCK_TOKENS
    roomy = plan()
    assert roomy.num_full_blocks == 4 * one
    assert roomy.full_cache_bytes == roomy.num_full_blocks * block_bytes(GPT_OSS_20B, "full")
    tight = plan(roomy.total_bytes - roomy.full_cache_bytes + one * block_bytes(GPT_OSS_20B, "full"))
    assert tight.num_full_blocks == one
    assert plan(max_sequences=1).num_full_blocks == one


def test_cache_takes_at_most_half_of_what_is_left() -> None:
    roomy = plan()
    without = roomy.total_bytes - roomy.full_cache_bytes
    chosen = plan(without + roomy.full_cache_bytes)
    assert chosen.num_full_blocks == roomy.num_full_blocks // 2


def test_window_blocks_cover_every_sequence_but_do_not_grow_with_the_context() -> None:
    short, long = plan(context_length=8192), plan(context_length=131_072)
    assert short.num_window_blocks == long.num_window_blocks
    assert short.num_window_blocks >= 16 * (128 // CACHE_BLOCK_TOKENS + 1) + 512 // CACHE_BLOCK_TOKENS
    assert short.num_window_blocks <= 16 * ((128 + 512) // CACHE_BLOCK_TOKENS + 2)


@pytest.mark.parametrize("max_sequences", [1, 2, 16, 100])
@pytest.mark.parametrize("max_batch_tokens", [1, 31, 512, 4096])
def test_one_whole_step_of_one_sequence_always_has_window_blocks(
    max_sequences: int, max_batch_tokens: int
) -> None:
    chosen = plan(max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)
    # The worst place of a chunk: it begins at a block's last slot, and its window reaches back from there.
    needed = (128 + max_batch_tokens - 2) // CACHE_BLOCK_TOKENS + 2
    assert chosen.num_window_blocks >= min(needed, 8192 // CACHE_BLOCK_TOKENS)


def test_auto_context_shrinks_to_what_fits() -> None:
    smallest = plan(max_sequences=1, context_length=512)
    limit = smallest.total_bytes + 20_000_000
    chosen = plan(limit, max_sequences=1)
    assert 512 <= chosen.context_length < 8192
    assert chosen.context_length % CACHE_BLOCK_TOKENS == 0
    assert chosen.total_bytes <= limit
    longer = plan(max_sequences=1, context_length=chosen.context_length + CACHE_BLOCK_TOKENS)
    assert longer.total_bytes > limit


def test_auto_context_is_not_longer_than_the_models() -> None:
    assert plan(config=replace(GPT_OSS_20B, max_context=1000)).context_length == 1000


def test_context_that_was_asked_for_is_kept_or_refused_never_cut() -> None:
    asked = plan(context_length=40_000)
    assert asked.context_length == 40_000
    with pytest.raises(MemoryPlanError, match=r"a context of at most [\d,]+ tokens"):
        plan(asked.total_bytes - asked.full_cache_bytes, context_length=40_000)


def test_context_that_is_advised_fits() -> None:
    asked = plan(context_length=40_000, max_sequences=1)
    limit = asked.total_bytes - asked.full_cache_bytes // 2
    with pytest.raises(MemoryPlanError) as refusal:
        plan(limit, context_length=40_000, max_sequences=1)
    advised = int(str(refusal.value).split("a context of at most ")[1].split(" tokens")[0].replace(",", ""))
    assert plan(limit, context_length=advised, max_sequences=1).total_bytes <= limit


def test_context_beyond_the_models_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"200,000.*131,072"):
        plan(context_length=200_000)


def test_refusal_gives_what_is_needed_and_what_there_is() -> None:
    with pytest.raises(
        MemoryPlanError, match=r"needs 1\d\.\d\d GB and this process may use 8\.00 GB.*streamed from the disk"
    ):
        plan(8 * GB)


def test_refusal_of_bf16_weights_advises_int8_when_that_fits() -> None:
    limit = plan(max_sequences=1).total_bytes
    with pytest.raises(MemoryPlanError, match="weights int8"):
        plan(limit, weights="bf16", max_sequences=1)


def test_bf16_experts_count_two_bytes_a_weight() -> None:
    chosen = plan_memory(GPT_OSS_20B, "bf16", EngineConfig(), 200 * GB)
    assert chosen.expert_bytes == 24 * 32 * 3 * 2880 * 2880 * 2


def test_model_without_window_layers_needs_no_window_blocks() -> None:
    chosen = plan(config=replace(GPT_OSS_20B, layer_kinds=("full",) * 24))
    assert chosen.num_window_blocks == 0
    assert chosen.window_cache_bytes == 0


def test_int8_cache_takes_17_of_32_bytes_and_131072_tokens_of_a_20b_fit_16_gb() -> None:
    """34 bytes hold 32 numbers with their scale, where bf16 takes 64."""
    for kind in ("full", "window"):
        assert block_bytes(GPT_OSS_20B, kind, "int8") * 32 == block_bytes(GPT_OSS_20B, kind) * 17
    small = plan(kv_cache="int8", context_length=131_072, max_sequences=1)
    assert small.full_cache_bytes == 12 * 131_072 * 8 * 2 * (64 + 4)
    assert small.total_bytes <= 16 * GB


def test_refusal_advises_an_int8_cache_when_that_fits() -> None:
    settings: dict[str, Any] = {"context_length": 131_072, "max_sequences": 1}
    between = plan(kv_cache="int8", **settings).total_bytes + 1
    with pytest.raises(MemoryPlanError, match="a key/value cache in int8"):
        plan(between, **settings)
