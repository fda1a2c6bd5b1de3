"""Our part of a round of compare.py: `python compare_ours.py WISH` measures one group.

WISH is JSON: model, weights, threads, seed, group and the fields of compare_rows.Wish. Prints JSON:
values and limits of rows, what the machine gave, and what we are; or {"error": ..., "exit_code": ...}.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from compare_process import run_program
from compare_rows import Group, Kind, Measured, Row, Wish

from harmonium.bench import BenchOptions, run_bench
from harmonium.checkpoint import open_checkpoint
from harmonium.config import EngineConfig
from harmonium.engine.create import create_engine
from harmonium.engine.local import LocalEngine
from harmonium.engine.protocol import Engine, Request
from harmonium.errors import CheckpointError, ConfigError, HarmoniumError
from harmonium.meter import Meter
from harmonium.model.batch import SamplingParams

_WARM_UP_TOKENS = 512


@dataclass
class Ours:
    """This package, on a checkpoint folder. Each group is measured in a process that ends before the next."""

    model: Path
    weights: str
    threads: int
    timeout: float
    name: str = "ours"

    def measure(self, group: Group, wish: Wish) -> Measured:
        job = {
            **dataclasses.asdict(wish),
            "group": group,
            "model": str(self.model),
            "weights": self.weights,
            "threads": self.threads,
            "seed": time.time_ns() % 2**32,
        }
        found = self._run(job)
        measured = Measured(peak_bytes=found.peak_bytes, about=found.about, limits=found.limits)
        if group == "start":
            again = self._run(job)  # with files that were just read
            measured.values[Row("ready")] = found.about["ready_seconds"]
            measured.values[Row("ready again")] = again.about["ready_seconds"]
        else:
            measured.values = found.values
        return measured

    def _run(self, job: dict[str, Any]) -> Measured:
        command = [sys.executable, str(Path(__file__).resolve()), json.dumps(job)]
        output, _, peak_bytes = run_program(command, "our part", self.timeout, Path.cwd())
        result: dict[str, Any] = json.loads(output)
        if "error" in result:
            kind = ConfigError if result["exit_code"] == ConfigError.exit_code else CheckpointError
            raise kind(result["error"])
        values = {Row(*row): value for row, value in result["values"]}
        limits = {Row(*row): value for row, value in result["limits"]}
        # The buffer that measures bandwidth is no part of the model: the report's own figure leaves it out.
        peak = min(peak_bytes, result["about"].pop("peak_resident_bytes", peak_bytes))
        return Measured(values, limits, peak, result["about"])


def measure_group(job: dict[str, Any]) -> Measured:
    """In the process of its own."""
    fields = {field.name for field in dataclasses.fields(Wish)}
    wish = Wish(**{name: _tuple(value) for name, value in job.items() if name in fields})
    model = Path(job["model"])
    # Without guesses: a random model that repeats itself would be faster than the weights can be read.
    config = EngineConfig(weights=job["weights"], threads=job["threads"], speculation="off")
    group: Group = job["group"]
    if group == "first token":
        return asyncio.run(_first_tokens(model, config, wish.first_token, job["seed"]))
    measured = _bench(model, config, group, wish, job["seed"])
    if group == "batch" and wish.same:
        measured.values |= asyncio.run(_same_streams(model, config, wish))
    return measured


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _bench(model: Path, config: EngineConfig, group: Group, wish: Wish, seed: int) -> Measured:
    report = run_bench(
        BenchOptions(
            model=model,
            config=config,
            prefill=wish.prefill if group == "prefill" else (),
            decode=wish.decode,
            depth=wish.depth if group == "depth" else (wish.batch_depth,) if group == "batch" else (),
            batch=wish.batch if group == "batch" else (1,),
            repetitions=1,
            seed=seed,
        )
    )
    rows = {Row(row.kind, row.num_tokens, row.depth, row.batch): row for row in report.rows}
    about = {
        "ready_seconds": report.ready_seconds,
        "peak_resident_bytes": report.peak_resident_bytes,
        "weights": report.weights,
        "isa": report.isa,
        "threads": report.threads,
        "read_bandwidth": [report.read_bandwidth_low, report.read_bandwidth, report.read_bandwidth_high],
        "int8_operations": [report.int8_operations],
    }
    values = {key: row.tokens_per_second for key, row in rows.items()}
    return Measured(values, {key: row.limit for key, row in rows.items()}, about=about)


class _Repeating(np.random.Generator):
    """Gives every caller the same numbers, so that all prompts are one."""

    def integers(self, *arguments: Any, **options: Any) -> Any:
        return np.random.default_rng(1).integers(*arguments, **options)


async def _same_streams(model: Path, config: EngineConfig, wish: Wish) -> dict[Row, float]:
    engine = await _engine(model, config, (wish.batch_depth + 2 * wish.decode) * 2, max(wish.batch))
    try:
        meter = Meter(engine, _Repeating(np.random.PCG64(1)))
        await meter.prefill_seconds(_WARM_UP_TOKENS)
        found: dict[Row, float] = {}
        for batch in wish.batch:
            windows = await meter.decode([batch], wish.batch_depth, wish.decode, repetitions=1)
            row = Row("same", wish.decode, wish.batch_depth, batch)
            found[row] = windows[0].tokens_per_second
        return found
    finally:
        await engine.close()


async def _first_tokens(model: Path, config: EngineConfig, num_tokens: int, seed: int) -> Measured:
    """Seconds to the first token: of a prompt never seen, of the same again, and after a restart."""
    rng = np.random.default_rng(seed)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="compare-cache-") as folder:
        kept = replace(config, cache_dir=folder)
        prompt = None
        for runs in (2, 1):
            engine = await _engine(model, kept, num_tokens + 1, 1)
            try:
                if prompt is None:
                    prompt = rng.integers(0, engine.info.vocabulary_size, num_tokens).tolist()
                await Meter(engine, rng).prefill_seconds(min(_WARM_UP_TOKENS, num_tokens))
                seconds += [await _seconds_to_first_token(engine, prompt) for _ in range(runs)]
            finally:
                await engine.close()  # which also ends the writing of the cache
    kinds: tuple[Kind, ...] = ("first token", "first token again", "restarted")
    return Measured({Row(kind, num_tokens): value for kind, value in zip(kinds, seconds, strict=True)})


async def _seconds_to_first_token(engine: Engine, prompt: list[int]) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_stop=True)
    start = time.perf_counter()
    async for event in engine.generate(Request(f"compare-{time.time_ns()}", tuple(prompt), sampling)):
        if event.error is not None:
            raise CheckpointError(f"the engine failed while it was being measured: {event.error}")
    return time.perf_counter() - start


async def _engine(model: Path, config: EngineConfig, context: int, max_sequences: int) -> LocalEngine:
    with open_checkpoint(model) as checkpoint:
        max_context = checkpoint.config.max_context
    context_length = min(max(context, 4096), max_context)
    sequences = max(config.max_sequences, max_sequences)
    engine = create_engine(model, replace(config, context_length=context_length, max_sequences=sequences))
    assert isinstance(engine, LocalEngine)
    await engine.wait_until_resident()
    return engine


def main(argv: list[str]) -> int:
    try:
        found = measure_group(json.loads(argv[0]))
    except HarmoniumError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return 0
    values, limits = (
        [[dataclasses.astuple(row), value] for row, value in rows.items()]
        for rows in (found.values, found.limits)
    )
    print(json.dumps({"values": values, "limits": limits, "about": found.about}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
