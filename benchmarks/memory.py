"""Does the process take what the plan says? Loads a model, prefills a whole context, decodes, and looks.

    python benchmarks/memory.py MODEL [--weights int8] [--tokens 4096] [--json]

Prints the plan's parts, what the system counts as resident (peak and at the end), and plan over peak.
Everything that a serving process holds is in it: the vocabulary and the libraries of the command line are
loaded too.
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
from harmonium.model.memory import plan_memory
from harmonium.model.native import NativeRunner


def main() -> None:
    parser = argparse.ArgumentParser(description="The memory plan against what the process takes")
    parser.add_argument("model")
    parser.add_argument("--weights", default="int8", choices=("int8", "bf16"))
    parser.add_argument("--tokens", type=int, default=4096, help="how far into the context to go")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings: Any = {**environment_config(), "weights": options.weights}
    engine = EngineConfig(**settings)
    resolved = resolve(engine, probe_hardware(supported_isa()))
    configure(resolved.isa, resolved.threads)
    loaded = (vocabulary(), prompt_toolkit.__version__, rich.markdown.Markdown)
    checkpoint = open_checkpoint(options.model)
    plan = plan_memory(
        checkpoint.config, checkpoint.expert_format, engine, resolved.memory_limit_bytes, resolved.threads
    )
    start = time.perf_counter()
    runner = NativeRunner(
        checkpoint, engine.weights, engine.max_batch_tokens, packs_experts=plan.packs_experts
    )
    load_seconds = time.perf_counter() - start
    runner.wait_until_resident()
    runner.allocate_cache(plan.num_full_blocks, plan.num_window_blocks)
    last = min(options.tokens, plan.context_length) - 1
    for position in range(0, last, engine.max_batch_tokens):
        step(runner, position, min(engine.max_batch_tokens, last - position), plan.num_window_blocks)
    step(runner, last, 1, plan.num_window_blocks)
    peak, resident = resident_bytes()
    figures = {
        **asdict(plan),
        "total_bytes": plan.total_bytes,
        "peak_bytes": peak,
        "resident_bytes": resident,
        "plan_over_peak": round(plan.total_bytes / peak, 4),
        "load_seconds": round(load_seconds, 2),
    }
    assert loaded and runner.config is checkpoint.config
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:20} {value / 1e9:8.3f} GB" if name.endswith("_bytes") else f"{name:20} {value:8}")


def step(runner: NativeRunner, position: int, num_tokens: int, num_window_blocks: int) -> None:
    """Tokens at these positions; one is sampled. Window blocks are used in turn, as an engine would."""
    rng = np.random.default_rng(position)
    blocks = np.arange(-(-(position + num_tokens) // CACHE_BLOCK_TOKENS), dtype=np.int32)[None]
    runner.step(
        Batch(
            token_id_T=rng.integers(0, runner.config.vocabulary_size, num_tokens).astype(np.int32),
            position_T=np.arange(position, position + num_tokens, dtype=np.int32),
            query_start_S1=np.array([0, num_tokens], np.int32),
            context_length_S=np.array([position + num_tokens], np.int32),
            full_block_SB=blocks,
            window_block_SB=blocks % max(1, num_window_blocks),
            logit_row_R=np.array([num_tokens - 1], np.int32),
            sampling=(RowSampling(SamplingParams(), uniform=0.5),),
        )
    )


def resident_bytes() -> tuple[int, int]:
    """(peak, now) as /proc/self/status counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    table = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(table["VmHWM"]) * 1024, int(table["VmRSS"]) * 1024


if __name__ == "__main__":
    main()
