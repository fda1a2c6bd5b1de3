"""Does the process take what the plan says? Loads a model, prefills, decodes, and looks.

    python benchmarks/memory.py MODEL [--tokens 4096] [--fill] [--weights int8] [--kv-cache bf16]
        [--experts auto] [--context-length N] [--max-sequences 16] [--json]

Prints the plan's parts, what the system counts as resident (peak and at the end), and plan over peak.
Everything that a serving process holds is in it: the vocabulary and the libraries of the command line are
loaded too. The last token of --tokens is decoded alone, `decode_seconds` says in what time (the second of two
such steps).

--fill: compute only the first step's tokens; the blocks behind them get copies of its keys and values, up to
--tokens. A prefill of 131,072 tokens takes an hour on two cores; memory and the last step are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import prompt_toolkit
import rich.markdown

from harmonium.checkpoint import open_checkpoint
from harmonium.config import CACHE_BLOCK_TOKENS, EngineConfig, environment_config, probe_hardware, resolve
from harmonium.harmony.vocabulary import vocabulary
from harmonium.kernels.runtime import configure, supported_isa
from harmonium.model.batch import Batch, RowSampling, SamplingParams
from harmonium.model.memory import MemoryPlan, plan_memory
from harmonium.model.native import NativeRunner


def main() -> None:
    options = _options()
    settings: Any = {
        **environment_config(),
        "weights": options.weights,
        "kv_cache": options.kv_cache,
        "experts": options.experts,
        "context_length": options.context_length,
        "max_sequences": options.max_sequences,
    }
    resolved = resolve(EngineConfig(**settings), probe_hardware(supported_isa()))
    configure(resolved.isa, resolved.threads)
    loaded = (vocabulary(), prompt_toolkit.__version__, rich.markdown.Markdown)
    checkpoint = open_checkpoint(options.model)
    engine, limit = resolved.config, resolved.memory_limit_bytes
    plan = plan_memory(checkpoint.config, checkpoint.expert_format, engine, limit, resolved.threads)
    start = time.perf_counter()
    runner = NativeRunner(
        checkpoint,
        engine.weights,
        plan.max_batch_tokens or engine.max_batch_tokens,
        packs_experts=plan.packs_experts,
        num_expert_slots=plan.num_expert_slots,
        kv_cache=engine.kv_cache,
    )
    load_seconds = time.perf_counter() - start
    runner.allocate_cache(plan.num_full_blocks, plan.num_window_blocks)
    last = min(options.tokens, plan.context_length) - 1
    # While experts are read and packed, as an answer would; the step after it meets them in their place.
    use_cache(runner, plan, last, fills=options.fill)
    runner.wait_until_resident()
    decode_seconds = step(runner, last, 1, plan.num_window_blocks)
    peak, resident = resident_bytes()
    figures = {
        **asdict(plan),
        "total_bytes": plan.total_bytes,
        "peak_bytes": peak,
        "resident_bytes": resident,
        "plan_over_peak": round(plan.total_bytes / peak, 4),
        "load_seconds": round(load_seconds, 2),
        "decode_seconds": round(decode_seconds, 4),
    }
    assert loaded and runner.config is checkpoint.config
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:20} {value / 1e9:8.3f} GB" if name.endswith("_bytes") else f"{name:20} {value:8}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The memory plan against what the process takes")
    parser.add_argument("model")
    parser.add_argument("--weights", default="int8", choices=("int8", "bf16"))
    parser.add_argument("--kv-cache", default="bf16", choices=("bf16", "int8"))
    parser.add_argument("--experts", default="auto", choices=("auto", "mapped", "packed", "streamed"))
    parser.add_argument("--context-length", type=int, metavar="N")
    parser.add_argument("--max-sequences", type=int, default=16, metavar="N")
    parser.add_argument("--tokens", type=int, default=4096, help="how far into the context to go")
    parser.add_argument("--fill", action="store_true", help="copy the first step's blocks to the others")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def use_cache(runner: NativeRunner, plan: MemoryPlan, last: int, fills: bool) -> float:
    """Positions up to `last`, the last one alone; the seconds of that step."""
    chunk = runner.max_batch_tokens
    for position in range(0, min(chunk, last) if fills else last, chunk):
        step(runner, position, min(chunk, last - position), plan.num_window_blocks)
    if fills:
        num_computed = min(chunk, last) // CACHE_BLOCK_TOKENS
        for block in range(num_computed, min(plan.num_full_blocks, last // CACHE_BLOCK_TOKENS + 1)):
            assert runner.write_block("full", block, runner.read_block("full", block % num_computed))
    return step(runner, last, 1, plan.num_window_blocks)


def step(runner: NativeRunner, position: int, num_tokens: int, num_window_blocks: int) -> float:
    """Tokens at these positions; one is sampled. Window blocks are used in turn, as an engine would.

    Returns the step's seconds.
    """
    rng = np.random.default_rng(position)
    blocks = np.arange(-(-(position + num_tokens) // CACHE_BLOCK_TOKENS), dtype=np.int32)[None]
    start = time.perf_counter()
    runner.step(
        Batch(
            token_id_T=rng.integers(0, runner.config.vocabulary_size, num_tokens).astype(np.int32),
            position_T=np.arange(position, position + num_tokens, dtype=np.int32),
            query_start_S1=np.array([0, num_tokens], np.int32),
            context_length_S=np.array([position + num_tokens], np.int32),
            full_block_SB=blocks,
            window_block_SB=blocks % max(1, num_window_blocks),
            logit_row_R=np.array([num_tokens - 1], np.int32),
            sampling=(RowSampling(SamplingParams(), key=5),),
        )
    )
    return time.perf_counter() - start


def resident_bytes() -> tuple[int, int]:
    """(peak, now) as /proc/self/status counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    table = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(table["VmHWM"]) * 1024, int(table["VmRSS"]) * 1024


if __name__ == "__main__":
    main()
