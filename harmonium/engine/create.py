"""From a checkpoint's path to an engine that serves it: look, plan, refuse or load, in this order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from harmonium.checkpoint.checkpoint import Checkpoint, open_checkpoint
from harmonium.checkpoint.lora import LoraAdapter, LoraFiles, open_lora
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.config import (
    CACHE_BLOCK_TOKENS,
    EngineConfig,
    Hardware,
    Resolved,
    environment_config,
    probe_hardware,
    resolve,
)
from harmonium.engine.adapters import ServedAdapter
from harmonium.engine.disk import BlockFiles
from harmonium.engine.local import LocalEngine
from harmonium.errors import CheckpointError, ConfigError, MemoryPlanError
from harmonium.kernels.runtime import configure, supported_isa
from harmonium.model.adapter_memory import adapter_bytes
from harmonium.model.attention import NATIVE, AttentionChoice
from harmonium.model.memory import MemoryPlan, plan_memory
from harmonium.model.native import NativeRunner
from harmonium.model.runner import Runner
from harmonium.model.torch_memory import plan_torch_memory

_log = logging.getLogger("harmonium.engine")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while weights are loaded."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """All that is decided before a weight is read; what `harmonium inspect` prints.

    checkpoint: open, headers checked; whoever holds the plan closes it, or hands it to a runner. adapters:
    the same of LoRA adapters, by their names. attention: what computes it, where, and why.
    """

    checkpoint: Checkpoint
    hardware: Hardware
    resolved: Resolved
    memory: MemoryPlan
    adapters: dict[str, LoraFiles]
    attention: AttentionChoice

    def close(self) -> None:
        """Let go of the files. A second call does nothing."""
        self.checkpoint.close()
        for files in self.adapters.values():
            files.close()


def plan_engine(path: str | Path, config: EngineConfig | None = None) -> EnginePlan:
    """Open a checkpoint, look at the machine, settle every "auto" and plan the memory. Takes none of it.

    Instruction set and threads that config leaves open come from the environment, if it names them.

    Raises ConfigError (no such path, a setting that the machine or the model cannot have), MemoryPlanError
    with the numbers and what to change, CheckpointError. What is wrong with an adapter begins with its name.
    """
    config = config or EngineConfig()
    unset = {name: value for name, value in environment_config().items() if getattr(config, name) is None}
    config = replace(config, **unset)  # type: ignore[arg-type]  # each value was checked for its name
    hardware = probe_hardware(supported_isa())
    resolved = resolve(config, hardware)
    if config.engine == "torch" and find_spec("torch") is None:
        raise ConfigError("engine is 'torch' and PyTorch is not installed; pip install 'harmonium[torch]'")
    attention = _choose_attention(config)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path))
        adapters = _open_adapters(config, checkpoint.config, stack)
        memory = _plan_memory(checkpoint, resolved, adapters, attention)
        if memory.streams_experts:
            resolved = _with_long_steps(resolved, memory.max_batch_tokens)
        stack.pop_all()
    return EnginePlan(checkpoint, hardware, resolved, memory, adapters, attention)


def _choose_attention(config: EngineConfig) -> AttentionChoice:
    """Raises ConfigError for a device or an implementation that cannot be had here."""
    if config.engine == "torch":
        from harmonium.model.torch_trial import choose_for_machine  # here: PyTorch is an extra

        return choose_for_machine(config.attention, config.device)
    if config.attention not in ("auto", NATIVE.name):
        raise ConfigError(
            f"attention is {config.attention!r} and engine is 'native'; expected 'auto' or 'native', "
            "or engine 'torch'"
        )
    return NATIVE


def _plan_memory(
    checkpoint: Checkpoint,
    resolved: Resolved,
    adapters: Mapping[str, LoraFiles],
    attention: AttentionChoice,
) -> MemoryPlan:
    model, config, limit = checkpoint.config, resolved.config, resolved.memory_limit_bytes
    if config.engine == "torch":
        return plan_torch_memory(model, checkpoint.expert_format, config, limit, attention)
    held = adapter_bytes(model, adapters.values(), config.max_batch_tokens)
    return plan_memory(model, checkpoint.expert_format, config, limit, resolved.threads, held)


def _with_long_steps(resolved: Resolved, max_batch_tokens: int) -> Resolved:
    """Streamed experts: a piece of a prompt reads nearly all of them, so it is as long as it can be.

    Pieces short enough for stall_seconds would take the disk's whole time for a few tokens each.
    """
    config = replace(resolved.config, max_batch_tokens=max_batch_tokens, stall_seconds=0.0)
    return replace(resolved, config=config)


def _open_adapters(config: EngineConfig, model: ModelConfig, stack: ExitStack) -> dict[str, LoraFiles]:
    adapters: dict[str, LoraFiles] = {}
    for source in config.lora:
        with _naming(source.name):
            adapters[source.name] = stack.enter_context(open_lora(source.path, model))
    return adapters


@contextmanager
def _naming(adapter: str) -> Iterator[None]:
    """Say which adapter it is that cannot be had."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"adapter {adapter!r}: {error}") from None


def create_engine(
    path: str | Path,
    config: EngineConfig | None = None,
    progress: Progress | None = None,
    model_name: str | None = None,
) -> LocalEngine:
    """Load a checkpoint and serve it. Sets the process's kernels and threads.

    progress: called while weights are loaded. model_name: None takes the folder's name, or the repository's.

    Raises what `plan_engine` raises, and MemoryPlanError when the machine gives less than was planned.
    """
    plan = plan_engine(path, config)
    _log_plan(plan)
    memory, resolved = plan.memory, plan.resolved
    try:
        configure(resolved.isa, resolved.threads, plan.hardware.cores)
        loaded = []
        for name, files in plan.adapters.items():
            with _naming(name), files:
                loaded.append(files.load())
        runner = _make_runner(plan, loaded, progress)
        runner.allocate_cache(memory.num_full_blocks, memory.num_window_blocks)
    except MemoryError as error:
        plan.close()
        raise MemoryPlanError(
            f"the machine did not give the {memory.total_bytes:,} bytes that the plan needs ({error}); "
            "expected that much to be available"
        ) from error
    except BaseException:
        plan.close()
        raise
    try:
        block_files = _open_block_files(plan)
    except BaseException:
        runner.close()
        raise
    served = enumerate(zip(plan.adapters, loaded, strict=True))
    return LocalEngine(
        runner,
        model_name=model_name or plan.checkpoint.name,
        context_length=memory.context_length,
        num_full_blocks=memory.num_full_blocks,
        num_window_blocks=memory.num_window_blocks,
        config=resolved.config,
        adapters=[
            ServedAdapter(name, index, adapter.digest, adapter.nbytes, adapter.max_rank)
            for index, (name, adapter) in served
        ],
        adapter_limit_bytes=memory.limit_bytes - (memory.total_bytes - memory.adapter_bytes),
        block_files=block_files,
    )


def _open_block_files(plan: EnginePlan) -> BlockFiles | None:
    """The folder of cached blocks that fit this model as it is run here. Raises ConfigError."""
    config = plan.resolved.config
    if config.cache_dir is None or not config.prefix_cache:
        return None
    # Whatever changes the numbers in a block; adapters are part of each block's chain.
    depends = f"1 {plan.checkpoint.fingerprint()} {config.weights} {plan.resolved.isa} {CACHE_BLOCK_TOKENS}"
    if config.kv_cache != "bf16":
        depends += f" {config.kv_cache}"
    name = blake2b(depends.encode(), digest_size=12).hexdigest()
    return BlockFiles(Path(config.cache_dir) / name, config.cache_limit_bytes)


def _make_runner(plan: EnginePlan, adapters: Sequence[LoraAdapter], progress: Progress | None) -> Runner:
    config = plan.resolved.config
    if config.engine == "torch":
        from harmonium.model.torch_runner import load_torch_runner  # here: PyTorch is an extra

        return load_torch_runner(
            plan.checkpoint, config.max_batch_tokens, plan.resolved.threads, plan.attention
        )
    return NativeRunner(
        plan.checkpoint,
        weights=config.weights,
        max_batch_tokens=config.max_batch_tokens,
        progress=progress,
        adapters=adapters,
        packs_experts=plan.memory.packs_experts,
        num_expert_slots=plan.memory.num_expert_slots,
        kv_cache=config.kv_cache,
    )


def _log_plan(plan: EnginePlan) -> None:
    resolved, memory = plan.resolved, plan.memory
    _log.info(
        "%s: %s kernels, %d threads, %s weights, context %d, %d + %d cache blocks, %.2f GB planned",
        plan.checkpoint.path,
        resolved.isa,
        resolved.threads,
        resolved.config.weights,
        memory.context_length,
        memory.num_full_blocks,
        memory.num_window_blocks,
        memory.total_bytes / 1e9,
    )
    _log.info("attention: %s", plan.attention)
