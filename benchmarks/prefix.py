"""How soon does an answer begin when its prompt was seen before?

    python benchmarks/prefix.py MODEL [--tokens 4000] [--prompts 3] [--kv-cache bf16] [--experts auto]
        [--cache-dir DIR] [--json]

Three times to the first token, each the median over the prompts (random tokens, all different):

cold: the prompt is new.
again: the same prompt once more, in the same process.
restart: the same prompt in a new process, which finds it in --cache-dir (default: a temporary folder, removed
    at the end).

A time runs from the request to its first token; the model is loaded and resident before. Files of the cache
are in the system's page cache, as after a restart of the server alone. In the same process a hit computes the
last token alone where its block is cached; after a restart it computes what follows the last whole block, 1
to 32 tokens: `computed` says how many. `load`: what create_engine took in the new process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine, Request
from harmonium.engine.create import create_engine
from harmonium.model.batch import SamplingParams


def main() -> None:
    options = _options()
    if options.part is not None:
        print(json.dumps(asyncio.run(_part(options))))
        return
    with tempfile.TemporaryDirectory(prefix="harmonium-prefix-") as temporary:
        folder = options.cache_dir or temporary
        first, second = (_run_part(part, folder) for part in ("first", "second"))
    row = summary(first, second)
    if options.json:
        print(json.dumps({"tokens": options.tokens, "kv_cache": options.kv_cache, **row}))
        return
    print(f"{options.tokens:,} tokens, {options.prompts} prompts, keys and values {options.kv_cache}")
    for name in ("cold", "again", "restart"):
        low, middle, high = row[name]
        share = "" if name == "cold" else f"   1/{row['cold'][1] / middle:.0f} of cold"
        print(f"{name:8} {middle:8.3f} s ({low:.3f} to {high:.3f}){share}")
    again, restart = row["computed"]
    print(f"computed {again} and {restart} tokens after a hit; load {row['load_seconds']:.2f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="First token of a prompt that was seen before")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4000, help="length of a prompt")
    parser.add_argument("--prompts", type=int, default=3, help="how many are measured")
    parser.add_argument("--kv-cache", choices=("bf16", "int8"), default="bf16")
    parser.add_argument("--experts", choices=("auto", "mapped", "packed"), default="auto")
    parser.add_argument("--cache-dir", metavar="DIR", help="default: a temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=("first", "second"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_part(part: str, folder: str) -> dict[str, Any]:
    """A process of its own: the second is a restart in earnest."""
    words = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--part", part, "--cache-dir", folder]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


async def _part(options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    config = EngineConfig(
        context_length=options.tokens + 64,
        max_sequences=1,
        kv_cache=options.kv_cache,
        experts=options.experts,
        cache_dir=options.cache_dir,
        cache_limit_bytes=1 << 40,
        speculation="off",
    )
    engine = create_engine(options.model, config)
    load_seconds = time.perf_counter() - start
    try:
        await engine.wait_until_resident()
        # Threads, scratch and the experts' memory are warm, and no measured prompt is known.
        await first_token(engine, tokens_of_prompt(-1, min(512, options.tokens)))
        found: dict[str, Any] = {"load_seconds": load_seconds}
        times = []
        for prompt in range(options.prompts):
            tokens = tokens_of_prompt(prompt, options.tokens)
            cold = await first_token(engine, tokens)
            hit = await first_token(engine, tokens) if options.part == "first" else cold
            times.append((cold, hit))
            if options.part == "first" and cold[1]:
                raise SystemExit(f"{options.cache_dir} knows the prompts already; expected an empty folder")
        found["cold"] = [cold[0] for cold, _ in times]
        found["hit"] = [hit[0] for _, hit in times]
        found["computed"] = options.tokens - min(hit[1] for _, hit in times)
        return found
    finally:
        await engine.close()


def tokens_of_prompt(number: int, num_tokens: int) -> tuple[int, ...]:
    """The same in every process."""
    rng = np.random.default_rng(1000 + number)
    return tuple(rng.integers(0, 100_000, num_tokens).tolist())


async def first_token(engine: LocalEngine, tokens: tuple[int, ...]) -> tuple[float, int]:
    """(seconds from the request to its first token, tokens that came from the cache)."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_stop=True)
    start = time.perf_counter()
    async for event in engine.generate(Request("r", tokens, params)):
        return time.perf_counter() - start, event.num_cached_tokens
    raise RuntimeError("the engine ended a request without a token")


def summary(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """(least, median, greatest) seconds of each kind."""

    def spread(seconds: list[float]) -> tuple[float, float, float]:
        return min(seconds), statistics.median(seconds), max(seconds)

    return {
        "cold": spread(first["cold"]),
        "again": spread(first["hit"]),
        "restart": spread(second["hit"]),
        "computed": (first["computed"], second["computed"]),
        "load_seconds": second["load_seconds"],
    }


if __name__ == "__main__":
    main()
