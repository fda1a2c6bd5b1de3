"""`harmonium inspect`: what a checkpoint is, how it would run on this machine, and what that takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harmonium.checkpoint.checkpoint import Checkpoint
from harmonium.checkpoint.gguf_checkpoint import GgufCheckpoint
from harmonium.config import CACHE_BLOCK_TOKENS, EngineConfig
from harmonium.engine.create import EnginePlan, plan_engine
from harmonium.errors import MemoryPlanError
from harmonium.kernels.runtime import configure
from harmonium.model.memory import MemoryPlan
from harmonium.model.speed import MEASURED_BYTES, SpeedLimit, measure_speed_limit
from harmonium.text_file import expand_home

_NO_LIMIT_BYTES = 1 << 60

_CACHES = {"bf16": "keys and values bf16", "int8": "keys and values int8 (a scale per 32)"}


@dataclass(frozen=True, slots=True)
class InspectReport:
    """refusal: why the plan does not fit, None where it does; the memory plan is then what would be
    needed. origin: what to call the checkpoint; None: its path. word: the name that it was found by.
    """

    plan: EnginePlan
    refusal: str | None
    origin: str | None = None
    speed: SpeedLimit | None = None
    word: str | None = None

    def to_json(self) -> dict[str, object]:
        """All of it, as `--json` prints it. Sizes in bytes."""
        checkpoint, resolved, memory = self.plan.checkpoint, self.plan.resolved, self.plan.memory
        total, active = num_parameters(checkpoint)
        return {
            "model": {
                "name": self.word,
                "path": self.origin or str(checkpoint.path),
                "layout": checkpoint.layout,
                "experts": checkpoint.expert_format,
                "parameters": total,
                "active_parameters": active,
                "ignored_tensors": list(checkpoint.ignored),
                "config": asdict(checkpoint.config),
            },
            "machine": asdict(self.plan.hardware),
            "run": {
                "engine": resolved.config.engine,
                "weights": self._weights(),
                "kv_cache": resolved.config.kv_cache,
                "isa": resolved.isa,
                "threads": resolved.threads,
                "context_length": memory.context_length,
                "max_batch_tokens": resolved.config.max_batch_tokens,
                "max_sequences": resolved.config.max_sequences,
                "attention": self.plan.attention.name,
                "device": asdict(self.plan.attention.device),
                "reasons": {**resolved.reasons, "attention": self.plan.attention.reason},
            },
            "adapters": {
                name: {"path": str(files.path), "bytes": files.nbytes, "max_rank": files.max_rank}
                for name, files in self.plan.adapters.items()
            },
            "memory": {**asdict(memory), "total_bytes": memory.total_bytes},
            "fits": self.refusal is None,
            "refusal": self.refusal,
            "speed": None if self.speed is None else self.speed.to_json(),
        }

    def text(self) -> str:
        """The same for people."""
        sections = [self._model(), self._run(), memory_table(self.plan.memory, len(self.plan.adapters))]
        if self.refusal is not None:
            sections.append(f"DOES NOT FIT: {self.refusal}\n")
        unknown = "speed      not looked at; harmonium bench MODEL measures it\n"
        sections.append(unknown if self.speed is None else self.speed.text())
        return "\n".join(sections)

    def _model(self) -> str:
        checkpoint = self.plan.checkpoint
        config, rope = checkpoint.config, checkpoint.config.rope
        total, active = num_parameters(checkpoint)
        kinds = config.layer_kinds
        rows = [
            (
                "model",
                f"{self.origin or checkpoint.path} "
                f"({checkpoint.layout} layout, {checkpoint.expert_format} experts)",
            ),
            ("parameters", f"{_count(total)}, {_count(active)} active for a token"),
            (
                "layers",
                f"{config.num_layers}: {kinds.count('full')} full, {kinds.count('window')} with a window of "
                f"{config.window}",
            ),
            ("width", f"{config.hidden_size}, expert {config.expert_size}"),
            (
                "experts",
                f"{config.num_experts}, {config.num_active_experts} for a token",
            ),
            ("heads", f"{config.num_heads} of {config.head_size}, {config.num_kv_heads} for keys and values"),
            ("vocabulary", f"{config.vocabulary_size:,}"),
            ("rope", f"theta {rope.theta:,.0f}, YaRN factor {rope.factor:g} over {rope.original_context:,}"),
            ("max context", f"{config.max_context:,} tokens"),
        ]
        if self.word is not None:
            rows.insert(0, ("name", self.word))
        if checkpoint.ignored:
            rows.append(("not used", f"{len(checkpoint.ignored)} tensors, such as {checkpoint.ignored[0]}"))
        return _table(rows)

    def _weights(self) -> str:
        """How dense weights are held: PyTorch's are in the dtype of its device, whatever is asked for."""
        config = self.plan.resolved.config
        return config.weights if config.engine == "native" else self.plan.attention.dtype

    def _run(self) -> str:
        resolved, hardware, memory = self.plan.resolved, self.plan.hardware, self.plan.memory
        reasons, config = resolved.reasons, resolved.config
        weights = {"int8": "int8 (a scale per 32; activations int8)", "bf16": "bf16, as in the checkpoint"}
        if isinstance(self.plan.checkpoint, GgufCheckpoint) and self.plan.checkpoint.dense_type == "Q8_0":
            weights["int8"] = "int8 (the numbers of the file's Q8_0; activations int8)"
            weights["bf16"] = "bf16, decoded from the file's Q8_0"
        held = weights.get(self._weights()) if config.engine == "native" else f"{self._weights()}, PyTorch"
        cached = (
            _CACHES[config.kv_cache] if config.engine == "native" else f"keys and values {self._weights()}"
        )
        return _table(
            [
                ("weights", f"{held}; experts {self.plan.checkpoint.expert_format}"),
                ("kernels", f"{resolved.isa} ({reasons['isa']}; of {', '.join(hardware.isa)})"),
                ("threads", f"{resolved.threads} ({reasons['threads']}: {len(hardware.cores)})"),
                ("attention", str(self.plan.attention)),
                ("context", f"{memory.context_length:,} tokens; {cached}"),
                ("step", f"{config.max_batch_tokens:,} tokens of {config.max_sequences:,} sequences at most"),
            ]
        )


def inspect(
    path: Path, config: EngineConfig, origin: str | None = None, word: str | None = None
) -> InspectReport:
    """Look at a checkpoint and plan; reads headers, takes no memory. A plan that does not fit is reported.

    word: what the user called it; in the report unless it is a path.
    Raises ConfigError and CheckpointError.
    """
    refusal = None
    try:
        plan = plan_engine(path, config)
    except MemoryPlanError as error:
        refusal = str(error)
        plan = plan_engine(path, replace(config, memory_limit_bytes=_NO_LIMIT_BYTES))
        device = plan.attention.device
        there = plan.hardware.memory_available_bytes if device.kind == "cpu" else device.free_bytes
        limit_bytes = config.memory_limit_bytes or there
        plan = replace(plan, memory=_least(plan.memory, limit_bytes))
    # Headers alone (origin) have no weights behind them that a disk could be measured with.
    is_measurable = refusal is None and not (origin and plan.memory.streams_experts)
    try:
        speed = _speed_limit(plan) if is_measurable else None
    finally:
        plan.close()
    is_path = word is None or expand_home(word).exists()
    return InspectReport(plan, refusal, origin, speed, None if is_path else word)


def _speed_limit(plan: EnginePlan) -> SpeedLimit | None:
    """Of a plan that fits and is open; None where there is no room to measure it, and for PyTorch."""
    if plan.resolved.config.engine == "torch":
        return None
    if plan.hardware.memory_available_bytes < 4 * MEASURED_BYTES:
        return None
    configure(plan.resolved.isa, plan.resolved.threads, plan.hardware.cores)
    return measure_speed_limit(plan.checkpoint, plan.resolved.config, plan.memory)


def _least(memory: MemoryPlan, limit_bytes: int) -> MemoryPlan:
    """What was refused: the same plan with room for one whole context and no more."""
    blocks = math.ceil(memory.context_length / CACHE_BLOCK_TOKENS)
    cache_bytes = memory.full_cache_bytes // max(1, memory.num_full_blocks) * blocks
    return replace(memory, num_full_blocks=blocks, full_cache_bytes=cache_bytes, limit_bytes=limit_bytes)


def num_parameters(checkpoint: Checkpoint) -> tuple[int, int]:
    """(all, used for one token): of the experts those chosen, of the embedding a row.

    MXFP4 blocks hold two parameters a byte; scales are none.
    """
    config = checkpoint.config
    total = active = 0
    for name, info in checkpoint.tensors.items():
        if name.endswith(".scales"):
            continue
        size = math.prod(info.shape) * (2 if name.endswith(".blocks") else 1)
        total += size
        if ".experts." in name:
            active += size * config.num_active_experts // config.num_experts
        elif name == "embedding.weight":
            active += config.hidden_size
        else:
            active += size
    return total, active


def memory_table(memory: MemoryPlan, num_adapters: int = 0) -> str:
    """The plan, a line for each part."""
    tokens = CACHE_BLOCK_TOKENS
    rows = [
        (
            "experts",
            memory.expert_bytes + memory.packing_bytes,
            _expert_remark(memory),
        ),
        ("dense weights", memory.dense_bytes, ""),
        ("embedding", memory.embedding_bytes, "pages mapped at a time"),
        ("full cache", memory.full_cache_bytes, f"{memory.num_full_blocks:,} blocks of {tokens} tokens"),
        (
            "window cache",
            memory.window_cache_bytes,
            f"{memory.num_window_blocks:,} blocks of {tokens} tokens",
        ),
        ("scratch", memory.scratch_bytes, "for a step"),
        ("process", memory.process_bytes, "what is there without a model"),
        ("total", memory.total_bytes, f"of {_size(memory.limit_bytes).strip()} that this process may use"),
    ]
    if num_adapters:
        rows.insert(3, ("adapters", memory.adapter_bytes, f"{num_adapters}, with what a step needs for them"))
    lines = [f"  {name:<14} {_size(size)}  {remark}".rstrip() for name, size, remark in rows]
    return "\n".join(["memory", *lines]) + "\n"


def _expert_remark(memory: MemoryPlan) -> str:
    if memory.streams_experts:
        return f"streamed: {memory.num_expert_slots:,} in memory, the others read when needed"
    if memory.packs_experts:
        return "packed while the first answers run; a layer is there twice meanwhile"
    return "mapped, used where they lie in the files"


def _table(rows: list[tuple[str, str]]) -> str:
    return "".join(f"{name:<12} {value}\n" for name, value in rows)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:8.2f} GB" if size_bytes >= 10**9 else f"{size_bytes / 1e6:8.1f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 10**9 else f"{number / 1e6:.2f} million"
