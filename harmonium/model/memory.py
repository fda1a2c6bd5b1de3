"""Memory is planned before it is taken: weights, cache and scratch against what this process may use."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from harmonium.checkpoint.model_config import LayerKind, ModelConfig
from harmonium.config import CACHE_BLOCK_TOKENS, EngineConfig, KvCache, Weights
from harmonium.errors import ConfigError, MemoryPlanError
from harmonium.kernels import attention_scratch_bytes, matmul_scratch_bytes, packed_shape
from harmonium.kernels.sampling import sampling_scratch_bytes
from harmonium.kernels.unembedding import split_bytes
from harmonium.model.costs import cached_row_bytes
from harmonium.model.streaming_memory import (
    STREAMED_BATCH_TOKENS,
    least_slots,
    slot_bytes,
    spare_bytes,
    stream_scratch_bytes,
)

AUTO_CONTEXT_TOKENS = 8192
"""Longest context that is chosen unasked: 0.2 GB of cache for a 20b."""

SHORTEST_AUTO_CONTEXT_TOKENS = 512
"""A context below this is not chosen unasked: a system message and a question would hardly fit."""

SHARED_CONTEXTS = 4
"""Whole contexts that the cache holds when memory allows: for several sequences and kept prefixes."""

MAX_LOGIT_ROWS = 32
"""Rows of logits that scratch holds at once; more are computed in turns. A guess of 31 tokens takes 32."""

EMBEDDING_ROWS_KEPT = 32
"""Embedding rows gathered before the map's pages are given back."""

_MAPPED_AROUND_BYTES = 2 << 20
"""What Linux may map for one fault in a cached file: a huge folio of the page cache; 64 KB where it has none.
Measured with 6.18 and ext4: 0.6 MB a row on average."""

PACKING_SPARE_BYTES = 2 << 30
"""Memory that must be left besides before experts are packed unasked: mapped pages can be taken back."""

PROCESS_BYTES = 130 << 20
"""Interpreter, libraries, vocabulary, thread stacks: docs/numerics.md says how it was measured."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory of a process that serves a model goes, in bytes.

    expert_bytes: mapped, used where it lies in the files; of streamed experts, those in memory. dense_bytes:
    qkv, out and unembedding as `weights` holds them, and the small tensors. embedding_bytes: pages of the
    embedding that are mapped at a time.
    process_bytes: everything that is there without a model. limit_bytes: what the process may use.
    adapter_bytes: LoRA adapters, and what a step needs for them. packing_bytes: what packed experts take more
    than mapped ones, at the most: a layer is there twice while it is packed. 0: they are not packed.
    num_expert_slots: streamed experts that are in memory at a time; 0: they are not streamed.
    max_batch_tokens: of a step.
    """

    context_length: int
    num_full_blocks: int
    num_window_blocks: int
    expert_bytes: int
    dense_bytes: int
    embedding_bytes: int
    full_cache_bytes: int
    window_cache_bytes: int
    scratch_bytes: int
    process_bytes: int
    limit_bytes: int
    adapter_bytes: int = 0
    packing_bytes: int = 0
    num_expert_slots: int = 0
    max_batch_tokens: int = 0

    @property
    def streams_experts(self) -> bool:
        """Whether only some experts are in memory, and the others read when they are needed."""
        return self.num_expert_slots > 0

    @property
    def packs_experts(self) -> bool:
        """Whether experts are copied in the order of the products once they are read."""
        return self.packing_bytes > 0

    @property
    def left_bytes(self) -> int:
        """What the plan leaves for streamed experts."""
        return max(0, self.limit_bytes - self.total_bytes - spare_bytes(self.limit_bytes))

    @property
    def total_bytes(self) -> int:
        return (
            self.expert_bytes
            + self.dense_bytes
            + self.embedding_bytes
            + self.full_cache_bytes
            + self.window_cache_bytes
            + self.scratch_bytes
            + self.process_bytes
            + self.adapter_bytes
            + self.packing_bytes
        )


def plan_memory(
    config: ModelConfig,
    expert_format: str,
    engine_config: EngineConfig,
    memory_limit_bytes: int,
    threads: int = 1,
    adapter_bytes: int = 0,
) -> MemoryPlan:
    """Settle the context length and the cache, and count the bytes. Pure.

    expert_format: "mxfp4" or "bf16". adapter_bytes: what LoRA adapters take. Raises ConfigError for a
    context longer than the model's, MemoryPlanError for a plan that does not fit (it says what is needed,
    what there is, and what to change).
    """
    wanted = engine_config.context_length
    if wanted is not None and wanted > config.max_context:
        raise ConfigError(
            f"context_length is {wanted:,}; this model's longest context is {config.max_context:,}"
        )
    longest = min(AUTO_CONTEXT_TOKENS, config.max_context) if wanted is None else wanted
    planner = _Planner(config, expert_format, engine_config, memory_limit_bytes, threads, adapter_bytes)
    budget = engine_config.expert_memory_bytes
    if engine_config.experts == "streamed" or (
        budget is not None and budget < expert_bytes(config, expert_format)
    ):
        return planner.with_experts_streamed(longest)
    plan = planner.plan(longest)
    if plan.total_bytes <= memory_limit_bytes:
        return planner.with_experts_placed(plan)
    if wanted is None:
        fitting = planner.longest_fitting(longest)
        if fitting is not None and fitting.context_length >= min(SHORTEST_AUTO_CONTEXT_TOKENS, longest):
            return planner.with_experts_placed(fitting)
    if engine_config.experts == "auto" and expert_format == "mxfp4":
        try:
            return planner.with_experts_streamed(longest)
        except MemoryPlanError:
            pass  # what is needed to have them all in memory is the better thing to say
    raise MemoryPlanError(_refusal(plan, planner))


def block_bytes(config: ModelConfig, kind: LayerKind, kv_cache: KvCache = "bf16") -> int:
    """One block of keys and values of every layer of that kind."""
    rows = config.layer_kinds.count(kind) * 2 * config.num_kv_heads * CACHE_BLOCK_TOKENS
    return rows * cached_row_bytes(config.head_size, kv_cache)


def dense_bytes(config: ModelConfig, weights: Weights) -> int:
    """qkv, out and unembedding as they are held; biases, norms, sinks and routers as in the files."""
    D, HK = config.hidden_size, config.num_heads * config.head_size
    fused = HK + 2 * config.num_kv_heads * config.head_size
    matrix = int8_weight_bytes if weights == "int8" else _bf16_bytes
    layer = matrix(fused, D) + matrix(D, HK)
    small = fused + D + config.num_heads + 2 * D + config.num_experts * (D + 1)
    small += config.num_experts * (2 * config.expert_size + D)
    head = split_bytes if weights == "int8" else _bf16_bytes
    return config.num_layers * (layer + 2 * small) + head(config.vocabulary_size, D) + 2 * D


def int8_weight_bytes(num_outputs: int, num_inputs: int) -> int:
    """An int8 matrix in panels of 16 outputs: 1,088 bytes for two blocks (docs/kernels.md)."""
    num_blocks = math.ceil(num_inputs / 32)
    panel = math.ceil(num_blocks / 2) * 1088
    return math.ceil(num_outputs / 16) * panel


def _bf16_bytes(num_outputs: int, num_inputs: int) -> int:
    return 2 * num_outputs * num_inputs


def expert_bytes(config: ModelConfig, expert_format: str) -> int:
    """All experts' matrices as they lie in the files: MXFP4 takes 17 bytes per 32 weights."""
    weights = config.num_layers * config.num_experts * 3 * config.expert_size * config.hidden_size
    return weights * 2 if expert_format == "bf16" else weights // 32 * 17


def packing_bytes(config: ModelConfig) -> int:
    """What experts in packed tiles take more than in the files, and a layer of mapped ones beside them."""
    mapped = expert_bytes(config, "mxfp4")
    shapes = (2 * config.expert_size, config.hidden_size), (config.hidden_size, config.expert_size)
    expert = sum(math.prod(packed_shape(*shape)) for shape in shapes)
    return config.num_layers * config.num_experts * expert - mapped + mapped // config.num_layers


def step_scratch_bytes(config: ModelConfig, max_batch_tokens: int) -> int:
    """What NativeRunner takes for a step: hidden and normed rows, qkv, mixed heads, routes, logits."""
    HK = config.num_heads * config.head_size
    row = 2 * config.hidden_size + HK + 2 * config.num_kv_heads * config.head_size + HK
    row += 2 * config.num_active_experts
    logits = min(MAX_LOGIT_ROWS, max_batch_tokens) * config.vocabulary_size
    return 4 * (max_batch_tokens * row + logits)


def kernel_scratch_bytes(
    config: ModelConfig, max_batch_tokens: int, max_sequences: int, context_length: int, threads: int
) -> int:
    """What kernels keep between calls, as they say themselves."""
    D, HK = config.hidden_size, config.num_heads * config.head_size
    matmul = matmul_scratch_bytes(
        max_batch_tokens, D, config.expert_size, config.num_active_experts, max(D, HK), threads
    )
    attention = attention_scratch_bytes(
        config.num_heads,
        config.num_kv_heads,
        config.head_size,
        max_batch_tokens,
        min(max_sequences, max_batch_tokens),
        context_length,
        threads,
    )
    return matmul + attention + sampling_scratch_bytes(config.vocabulary_size, threads)


@dataclass(frozen=True, slots=True)
class _Planner:
    """What a plan depends on, but for the context length."""

    config: ModelConfig
    expert_format: str
    engine: EngineConfig
    limit_bytes: int
    threads: int
    adapter_bytes: int
    streams: bool = False

    def plan(self, context_length: int) -> MemoryPlan:
        """The plan for this context; its cache takes what is wanted, what is affordable, or one context."""
        config, step = self.config, self.engine.max_batch_tokens
        num_window_blocks = self._num_window_blocks(context_length)
        table = 2 * config.vocabulary_size * config.hidden_size
        row_pages = _MAPPED_AROUND_BYTES + 2 * config.hidden_size
        kernels = kernel_scratch_bytes(config, step, self.engine.max_sequences, context_length, self.threads)
        plan = MemoryPlan(
            context_length=context_length,
            num_full_blocks=0,
            num_window_blocks=num_window_blocks,
            expert_bytes=0 if self.streams else expert_bytes(config, self.expert_format),
            dense_bytes=dense_bytes(config, self.engine.weights),
            embedding_bytes=min(table, EMBEDDING_ROWS_KEPT * row_pages),
            full_cache_bytes=0,
            window_cache_bytes=num_window_blocks * block_bytes(config, "window", self.engine.kv_cache),
            scratch_bytes=step_scratch_bytes(config, step) + kernels,
            process_bytes=PROCESS_BYTES,
            limit_bytes=self.limit_bytes,
            adapter_bytes=self.adapter_bytes,
            max_batch_tokens=step,
        )
        if self.streams:
            scratch = plan.scratch_bytes + stream_scratch_bytes(config, step)
            plan = replace(plan, scratch_bytes=scratch)
        one_context = math.ceil(context_length / CACHE_BLOCK_TOKENS)
        wanted = one_context * min(self.engine.max_sequences, SHARED_CONTEXTS)
        block = block_bytes(config, "full", self.engine.kv_cache)
        # Half of what is left at most: the rest is the file cache's, and other programs'; or the experts'.
        share = 8 if self.streams else 2
        affordable = max(0, self.limit_bytes - plan.total_bytes) // share // block if block else wanted
        num_full_blocks = max(one_context, min(wanted, affordable))
        return replace(plan, num_full_blocks=num_full_blocks, full_cache_bytes=num_full_blocks * block)

    def longest_fitting(self, longest: int) -> MemoryPlan | None:
        """The plan with the longest context, in whole blocks, that fits; None when one block does not."""
        low, high = 0, longest // CACHE_BLOCK_TOKENS
        best = None
        while low < high:
            middle = (low + high + 1) // 2
            plan = self.plan(middle * CACHE_BLOCK_TOKENS)
            if plan.total_bytes <= self.limit_bytes:
                low, best = middle, plan
            else:
                high = middle - 1
        return best

    def with_experts_placed(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with experts packed, where they can be, are wanted and fit. Raises as plan_memory does."""
        wanted = self.engine.experts
        can_pack = self.expert_format == "mxfp4" and self.engine.weights == "int8"
        if wanted == "packed" and not can_pack:
            raise ConfigError(
                f"experts is 'packed' with {self.expert_format} experts and weights {self.engine.weights!r}; "
                "expected MXFP4 experts and weights 'int8'"
            )
        if wanted == "mapped" or not can_pack:
            return plan
        packed = replace(plan, packing_bytes=packing_bytes(self.config))
        spare = PACKING_SPARE_BYTES if wanted == "auto" else 0
        if packed.total_bytes + spare <= self.limit_bytes:
            return packed
        if wanted == "packed":
            raise MemoryPlanError(
                f"packed experts need {_gb(packed.total_bytes)} and this process may use "
                f"{_gb(self.limit_bytes)}; experts 'mapped' need {_gb(plan.total_bytes)}"
            )
        return plan

    def with_experts_streamed(self, context_length: int) -> MemoryPlan:
        """The plan with as many experts in memory as there is room for.

        Steps may be longer than asked for: a step of a prompt reads most experts, whatever its length. Raises
        ConfigError for bf16 experts and an expert_memory_bytes below a few experts, MemoryPlanError.
        """
        if self.expert_format != "mxfp4":
            raise ConfigError(f"experts is 'streamed' with {self.expert_format} experts; expected MXFP4 ones")
        config, asked = self.config, self.engine.max_batch_tokens
        size, least = slot_bytes(config), least_slots(config)
        budget = self.engine.expert_memory_bytes
        if budget is not None and budget < least * size:
            raise ConfigError(
                f"expert_memory_bytes is {budget:,}; expected at least {least * size:,}, for {least} experts"
            )
        shortest = replace(self, streams=True).plan(context_length)
        plan, left = shortest, shortest.left_bytes
        for step in STREAMED_BATCH_TOKENS:
            longer = replace(self, streams=True, engine=replace(self.engine, max_batch_tokens=step))
            if step > asked and left - (longer_plan := longer.plan(context_length)).left_bytes <= left // 8:
                plan, left = longer_plan, longer_plan.left_bytes
                break
        slots = min(config.num_layers * config.num_experts, left // size)
        if budget is not None:
            slots = min(slots, budget // size)
        if slots < least:
            needed = plan.total_bytes + spare_bytes(self.limit_bytes) + least * size
            raise MemoryPlanError(
                f"streamed experts need {_gb(needed)} and this process may use {_gb(self.limit_bytes)}; "
                "a shorter context or fewer sequences need less"
            )
        return replace(plan, expert_bytes=slots * size, num_expert_slots=slots)

    def can_stream(self, context_length: int) -> bool:
        try:
            return self.with_experts_streamed(context_length).streams_experts
        except ConfigError:
            return False

    def _num_window_blocks(self, context_length: int) -> int:
        """Every sequence's window, what one step writes, and as many windows again for kept prefixes.

        What a step writes counts twice: a chunk's blocks are freed after the next chunk was placed.
        """
        if "window" not in self.config.layer_kinds:
            return 0
        sequences, step = self.engine.max_sequences, self.engine.max_batch_tokens
        window = math.ceil(self.config.window / CACHE_BLOCK_TOKENS) + 2
        pool = sequences * window + 2 * (math.ceil(step / CACHE_BLOCK_TOKENS) + 1)
        if self.engine.prefix_cache:
            pool += sequences * window
        whole = math.ceil((self.config.window + step) / CACHE_BLOCK_TOKENS) + 2
        whole = min(whole, math.ceil(context_length / CACHE_BLOCK_TOKENS) + 1)
        return max(whole, min(pool, sequences * whole))


def _refusal(plan: MemoryPlan, planner: _Planner) -> str:
    """The numbers, and every change that would make the plan fit."""
    engine = planner.engine

    def fits(**changes: Any) -> bool:
        changed = replace(planner, engine=replace(engine, **changes))
        return changed.plan(plan.context_length).total_bytes <= plan.limit_bytes

    advice = []
    shorter = planner.longest_fitting(plan.context_length)
    if shorter is not None:
        advice.append(f"a context of at most {shorter.context_length:,} tokens")
    if engine.max_sequences > 1 and fits(max_sequences=1):
        advice.append("fewer sequences at a time")
    if engine.max_batch_tokens > 64 and fits(max_batch_tokens=64):
        advice.append("fewer tokens in a step")
    if engine.weights == "bf16" and fits(weights="int8"):
        advice.append("weights int8")
    if engine.experts == "mapped" and planner.can_stream(plan.context_length):
        advice.append("experts streamed from the disk")
    if engine.engine == "native" and engine.kv_cache == "bf16" and fits(kv_cache="int8"):
        advice.append("a key/value cache in int8")
    if plan.adapter_bytes and plan.total_bytes - plan.adapter_bytes <= plan.limit_bytes:
        advice.append(f"fewer adapters (they take {_gb(plan.adapter_bytes)})")
    remedy = "no setting makes it fit: it needs more memory"
    if advice:
        remedy = "would fit: " + ", or ".join(advice)
    weights = plan.expert_bytes + plan.dense_bytes + plan.embedding_bytes + plan.adapter_bytes
    cache = plan.full_cache_bytes + plan.window_cache_bytes
    return (
        f"the model needs {_gb(plan.total_bytes)} and this process may use {_gb(plan.limit_bytes)} "
        f"(weights {_gb(weights)}, cache for {plan.context_length:,} tokens {_gb(cache)}, "
        f"scratch {_gb(plan.scratch_bytes)}, process {_gb(plan.process_bytes)}); {remedy}"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
