"""How long does a long prompt that arrives hold up an answer that runs?

    python benchmarks/stall.py MODEL [--prompt 4000] [--stall-seconds 0.4,0]

One request decodes; a second with a long prompt arrives. Printed for each setting: the longest and the median
gap between two tokens of the first while the second is in prefill, and the second's time to its first token.
Setting 0 is no limit: prompts are then computed in whole chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import numpy as np

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine, Request
from harmonium.engine.create import create_engine
from harmonium.model.batch import SamplingParams


def random_request(num_tokens: int, max_tokens: int, seed: int) -> Request:
    """A prompt that no cache knows."""
    tokens = np.random.default_rng(seed).integers(0, 100_000, num_tokens)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_stop=True)
    return Request(f"r{seed}", tuple(tokens.tolist()), params)


async def measure(engine: LocalEngine, num_prompt: int, seed: int) -> tuple[list[float], float]:
    """(gaps of the first while the second is in prefill, seconds to the second's first token)."""
    times: list[float] = []
    is_running = asyncio.Event()

    async def decode() -> None:
        async for _ in engine.generate(random_request(16, 4096, seed)):
            times.append(time.perf_counter())
            if len(times) == 8:
                is_running.set()

    running = asyncio.create_task(decode())
    await is_running.wait()
    start = time.perf_counter()
    async for _ in engine.generate(random_request(num_prompt, 1, seed + 1)):
        break
    end = time.perf_counter()
    running.cancel()
    during = [t for t in times if t >= start]
    return [b - a for a, b in zip([start, *during], [*during, end], strict=True)], end - start


async def run(model: str, num_prompt: int, stall_seconds: list[float]) -> None:
    for stall in stall_seconds:
        config = EngineConfig(
            context_length=8192, max_sequences=2, stall_seconds=stall, prefix_cache=False, speculation="off"
        )
        engine = create_engine(model, config)
        await engine.wait_until_resident()
        await measure(engine, 512, 1)  # the pace finds its limit
        gaps, first = await measure(engine, num_prompt, 11)
        await engine.close()
        print(
            f"stall {stall:g} s: longest gap {max(gaps):.2f} s, median {statistics.median(gaps):.2f} s; "
            f"first token of {num_prompt:,} after {first:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of the prompt that arrives")
    parser.add_argument("--stall-seconds", default="0.4,0", help="settings to try, with commas between them")
    options = parser.parse_args()
    asyncio.run(run(options.model, options.prompt, [float(s) for s in options.stall_seconds.split(",")]))


if __name__ == "__main__":
    main()
