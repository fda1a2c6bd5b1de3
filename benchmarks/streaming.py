"""Experts streamed from the disk: tokens a second against what the disk's rate allows for what must be read.

    python benchmarks/streaming.py MODEL [--share 0.25] [--prompt 64] [--warm-up 16] [--tokens 32] [--json]

MODEL: a checkpoint with MXFP4 experts; `benchmarks/random_slice.py` makes one in the shapes of gpt-oss-120b.
Its files leave the page cache first. The disk is measured in the same run, before and after, as experts are
read and with nothing else to do. "needed" bytes are those of experts that were not in memory when a layer
wanted them, rightly guessed ones too; what a wrong guess read counts against us. The limit: those bytes at
the disk's rate, and nothing else taking any time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harmonium.checkpoint import open_checkpoint
from harmonium.checkpoint.expert_pieces import ExpertPieces, expert_pieces
from harmonium.config import CACHE_BLOCK_TOKENS, probe_hardware
from harmonium.kernels.runtime import configure, supported_isa
from harmonium.model.batch import Batch, RowSampling, SamplingParams
from harmonium.model.disk_rate import measure_disk_rate
from harmonium.model.expert_cache import ExpertCounts
from harmonium.model.native import NativeRunner
from harmonium.model.streaming_memory import slot_bytes


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps, and what the cache did in them."""

    seconds: float
    num_tokens: int
    counts: ExpertCounts

    def figures(self, expert_bytes: int, disk_rate: float) -> dict[str, float]:
        counts = self.counts
        needed = (counts.misses + counts.true_guesses) * expert_bytes
        wanted = counts.hits + counts.late_hits + counts.misses
        limit = needed / disk_rate
        return {
            "tokens_per_second": self.num_tokens / self.seconds,
            "limit_tokens_per_second": self.num_tokens / limit if limit else float("inf"),
            "share_of_limit": limit / self.seconds,
            "in_memory": 1 - needed / expert_bytes / wanted if wanted else float("nan"),
            "needed_mb_per_token": needed / 1e6 / self.num_tokens,
            "read_over_needed": counts.bytes_read / needed if needed else 1.0,
            "guesses": counts.guesses,
            "true_guesses": counts.true_guesses,
            "wait_share": counts.wait_seconds / self.seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Streamed experts against the disk")
    parser.add_argument("model", type=Path)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts that memory holds")
    parser.add_argument("--prompt", type=int, default=64, help="tokens computed in one step first")
    parser.add_argument("--warm-up", type=int, default=16, help="decoded tokens that are not counted")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens that are")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-guess", action="store_true", help="read nothing ahead of need")
    parser.add_argument(
        "--mapped", action="store_true", help="use the files' pages instead: run it in a cgroup with a limit"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cores = probe_hardware(supported_isa()).cores
    configure(supported_isa()[-1], options.threads or len(cores), cores)
    checkpoint = open_checkpoint(options.model)
    config = checkpoint.config
    layers = [expert_pieces(checkpoint, layer) for layer in range(config.num_layers)]
    forget(layers)
    num_slots = max(
        2 * config.num_active_experts, int(options.share * config.num_layers * config.num_experts)
    )
    rates = [measure_disk_rate(layers, config.num_experts)]
    if options.mapped:
        num_slots = 0
    runner = NativeRunner(checkpoint, "int8", max(options.prompt, 1), num_expert_slots=num_slots)
    if options.no_guess and runner._stream is not None:
        runner._stream.cache.guess = lambda *arguments: None  # type: ignore[method-assign]
    total = options.prompt + options.warm_up + options.tokens
    runner.allocate_cache(*[-(-total // CACHE_BLOCK_TOKENS)] * 2)
    if not options.mapped:
        runner.wait_until_resident()
    before = resident_bytes()
    prompt = run(runner, 0, [options.prompt])
    run(runner, options.prompt, [1] * options.warm_up)
    decode = run(runner, options.prompt + options.warm_up, [1] * options.tokens)
    after = resident_bytes()
    runner.close()
    rates.append(measure_disk_rate(layers, config.num_experts))
    rate = sum(rates) / len(rates)
    expert_bytes = sum(piece.nbytes for piece in layers[0].pieces)
    report = {
        "disk_gb_per_second": [value / 1e9 for value in rates],
        "slots": num_slots,
        "slots_gb": num_slots * slot_bytes(config) / 1e9,
        "resident_before_gb": before / 1e9,
        "resident_after_gb": after / 1e9,
        "prompt": prompt.figures(expert_bytes, rate),
        "decode": decode.figures(expert_bytes, rate),
    }
    print(json.dumps(report, indent=None if options.json else 1))


def forget(layers: list[ExpertPieces]) -> None:
    """The files leave the page cache."""
    for file in {piece.file for layer in layers for piece in layer.pieces}:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(runner: NativeRunner, position: int, steps: list[int]) -> Phase:
    """Steps of so many tokens of one sequence, random ones, from this position on."""
    before, start = runner.expert_counts or ExpertCounts(), time.perf_counter()
    for num_tokens in steps:
        if num_tokens:
            step(runner, position, num_tokens)
            position += num_tokens
    seconds, after = time.perf_counter() - start, runner.expert_counts or ExpertCounts()
    names = ExpertCounts.__slots__
    counts = ExpertCounts(**{name: getattr(after, name) - getattr(before, name) for name in names})
    return Phase(seconds, sum(steps), counts)


def step(runner: NativeRunner, position: int, num_tokens: int) -> None:
    rng = np.random.default_rng(position)
    blocks = np.arange(-(-(position + num_tokens) // CACHE_BLOCK_TOKENS), dtype=np.int32)[None]
    runner.step(
        Batch(
            token_id_T=rng.integers(0, runner.config.vocabulary_size, num_tokens).astype(np.int32),
            position_T=np.arange(position, position + num_tokens, dtype=np.int32),
            query_start_S1=np.array([0, num_tokens], np.int32),
            context_length_S=np.array([position + num_tokens], np.int32),
            full_block_SB=blocks,
            window_block_SB=blocks,
            logit_row_R=np.array([num_tokens - 1], np.int32),
            sampling=(RowSampling(SamplingParams(), key=5),),
        )
    )


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
