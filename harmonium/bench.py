"""`harmonium bench`: what a model reaches on this machine, each figure beside what the machine allows.

A row is the median of several measurements with the least and the greatest; read bandwidth and int8
operations are measured between the rows of the same run, since a shared machine's swing from minute to
minute, and model/costs.py turns them into the limit of each row.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from harmonium.bench_report import BenchReport, BenchRow, print_report
from harmonium.checkpoint import Checkpoint, open_checkpoint
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.config import EngineConfig
from harmonium.engine.create import create_engine
from harmonium.engine.local import LocalEngine
from harmonium.engine.protocol import Engine
from harmonium.errors import ConfigError
from harmonium.kernels.matmul import measure_int8_ops, measure_read_bandwidth
from harmonium.kernels.runtime import current_isa, current_threads
from harmonium.kernels.unembedding import MAX_SCREENED_ROWS
from harmonium.meter import DecodeWindow, Meter
from harmonium.model.costs import Bound, ExpertFormat, StepCost, prefill_cost, step_cost

__all__ = ["BenchOptions", "BenchReport", "BenchRow", "print_report", "run_bench"]

Progress = Callable[[str], None]


_GAP_TOKENS = 32
"""Room for what a sequence decodes between two measurements, while the event loop turns."""


_USUAL_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure. prefill: prompt lengths; decode: tokens of one measurement; depth: tokens in the
    context before them; batch: sequences that share a step; repetitions: measurements of a row.
    seed: of the random prompts. buffer_bytes: read to find the machine's bandwidth; more than its caches
    hold.

    Raises ConfigError for values below 1 (depth: below 0).
    """

    model: Path
    config: EngineConfig = field(default_factory=EngineConfig)
    prefill: tuple[int, ...] = (512, 2048)
    decode: int = 64
    depth: tuple[int, ...] = (0, 4096)
    batch: tuple[int, ...] = (1, 4, 8, 16)
    repetitions: int = 3
    seed: int = 0
    buffer_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for name, values, low in (
            ("prefill", self.prefill, 1),
            ("decode", (self.decode,), 1),
            ("depth", self.depth, 0),
            ("batch", self.batch, 1),
            ("repetitions", (self.repetitions,), 1),
            ("buffer_bytes", (self.buffer_bytes,), 4096),
        ):
            for value in values:
                if value < low:
                    raise ConfigError(f"{name} is {value:,}; expected at least {low}")

    def least_context(self) -> int:
        """Tokens that the longest sequence of all rows grows to."""
        longest = max(self.prefill, default=1) + 1
        if self.depth and self.batch:
            longest = max(longest, *(self._decode_context(depth) for depth in self.depth))
        return longest

    def _decode_context(self, depth: int) -> int:
        # The first sequences decode a token in each step in which the last ones are still filled.
        prompts = max(self.batch) * max(1, depth)
        filling = -(-prompts // max(1, self.config.max_batch_tokens - max(self.batch))) + max(self.batch)
        windows = len(set(self.batch)) * self.repetitions * (self.decode + _GAP_TOKENS)
        return depth + filling + windows + _GAP_TOKENS

    def engine_config(self, max_context: int) -> EngineConfig:
        """The settings that hold all rows; the context is at least 4,096, as people have it.

        max_context: the model's own limit. Raises ConfigError when a row does not fit the context.
        """
        least = self.least_context()
        asked = self.config.context_length
        if least > (asked or max_context):
            name = "context_length" if asked else "the model's context"
            raise ConfigError(
                f"{name} is {asked or max_context:,}; the longest of these rows needs {least:,}"
            )
        context_length = asked or max(least, min(_USUAL_CONTEXT, max_context))
        sequences = max((self.config.max_sequences, *self.batch))
        return replace(self.config, context_length=context_length, max_sequences=sequences)


class _Limits:
    """Measures the machine again and again, and turns costs into limits."""

    def __init__(self, buffer_bytes: int) -> None:
        """buffer_bytes: what is read to find the bandwidth; it should be more than the caches hold."""
        self._buffer = np.ones(buffer_bytes, np.uint8)
        self.bandwidth: list[float] = []
        self.operations: list[float] = []
        self.measure()

    def measure(self) -> None:
        self.bandwidth.append(measure_read_bandwidth(self._buffer))
        self.operations.append(measure_int8_ops())

    def row_limit(self, cost: StepCost, num_tokens: int) -> tuple[float, Bound]:
        """Tokens a second, from the measurements just before and just after the row."""
        bandwidth = statistics.mean(self.bandwidth[-2:])
        operations = statistics.mean(self.operations[-2:])
        return num_tokens / cost.least_seconds(bandwidth, operations), cost.bound(bandwidth, operations)


def run_bench(
    options: BenchOptions,
    progress: Progress = lambda line: None,
    load_progress: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Load the model, measure every row, close it again.

    progress is told what comes next; load_progress (bytes done, bytes in all) while the weights are loaded.
    Not to be called where an event loop runs. Raises ConfigError, CheckpointError, and what the engine
    raises.
    """
    with open_checkpoint(options.model) as checkpoint:
        model, experts = checkpoint.config, checkpoint.expert_format
        # The 8-bit unembedding of a GGUF file is used as it is.
        splits_unembedding = isinstance(checkpoint, Checkpoint) and options.config.weights == "int8"
    config = options.engine_config(model.max_context)
    progress(f"loading {options.model}")
    start = time.perf_counter()
    engine = create_engine(options.model, config, load_progress)
    load_seconds = time.perf_counter() - start
    return asyncio.run(
        _Bench(options, config, model, experts, splits_unembedding, progress).run(engine, load_seconds)
    )


class _Bench:
    def __init__(
        self,
        options: BenchOptions,
        config: EngineConfig,
        model: ModelConfig,
        experts: ExpertFormat,
        splits_unembedding: bool,
        progress: Progress,
    ) -> None:
        self._options = options
        self._config = config
        self._model = model
        self._experts: ExpertFormat = experts
        self._splits_unembedding = splits_unembedding
        self._progress = progress

    async def run(self, engine: Engine, load_seconds: float) -> BenchReport:
        try:
            meter = Meter(engine, np.random.default_rng(self._options.seed))
            ready_seconds = load_seconds + await meter.prefill_seconds(1)
            if isinstance(engine, LocalEngine):
                self._progress("waiting for the experts")
                await engine.wait_until_resident()
            # A whole chunk goes through nearly every expert, so that no row waits for the disk.
            warm_up = min(self._config.max_batch_tokens, engine.info.context_length - 1)
            await meter.prefill_seconds(warm_up)
            peak_before = peak_resident_bytes()
            limits = _Limits(self._options.buffer_bytes)
            rows = [await self._prefill(meter, limits, num_tokens) for num_tokens in self._options.prefill]
            for depth in self._options.depth if self._options.batch else ():
                rows += await self._decode(meter, limits, depth)
            return BenchReport(
                model=engine.info.model_name,
                weights=self._config.weights,
                isa=current_isa(),
                threads=current_threads(),
                context_length=engine.info.context_length,
                load_seconds=load_seconds,
                ready_seconds=ready_seconds,
                # The buffer was resident from its first measurement on, and is no part of the model.
                peak_resident_bytes=max(peak_before, peak_resident_bytes() - self._options.buffer_bytes),
                read_bandwidth=statistics.median(limits.bandwidth),
                read_bandwidth_low=min(limits.bandwidth),
                read_bandwidth_high=max(limits.bandwidth),
                int8_operations=statistics.median(limits.operations),
                num_preemptions=engine.statistics.num_preemptions if isinstance(engine, LocalEngine) else 0,
                rows=tuple(rows),
            )
        finally:
            await engine.close()

    async def _prefill(self, meter: Meter, limits: _Limits, num_tokens: int) -> BenchRow:
        self._progress(f"prefill of {num_tokens:,}")
        await meter.prefill_seconds(min(num_tokens, 64))  # wakes threads and touches scratch
        speeds = [
            num_tokens / await meter.prefill_seconds(num_tokens) for _ in range(self._options.repetitions)
        ]
        limits.measure()
        chunk = self._config.max_batch_tokens
        cost = prefill_cost(
            self._model, self._config.weights, num_tokens, chunk, self._experts, self._config.kv_cache
        )
        limit, bound = limits.row_limit(cost, num_tokens)
        return BenchRow(
            "prefill", num_tokens, 0, 1, num_tokens / 2, *_median_low_high(speeds), limit=limit, bound=bound
        )

    async def _decode(self, meter: Meter, limits: _Limits, depth: int) -> list[BenchRow]:
        """The rows of one depth, fewest sequences first."""
        options = self._options
        self._progress(f"filling {max(options.batch)} x {depth:,} tokens")

        def on_batch(batch: int) -> None:
            self._progress(f"decode of {batch} x {options.decode} at {depth:,}")

        windows = await meter.decode(options.batch, depth, options.decode, options.repetitions, on_batch)
        limits.measure()  # not between the windows: the sequences would go on meanwhile
        return [self._decode_row(limits, depth, found) for found in _by_batch(windows)]

    def _decode_row(self, limits: _Limits, depth: int, windows: list[DecodeWindow]) -> BenchRow:
        batch = windows[0].num_sequences
        context = statistics.mean(window.context for window in windows)
        cost = step_cost(
            self._model,
            self._config.weights,
            num_tokens=batch,
            num_sequences=batch,
            num_logit_rows=batch,
            context=context,
            experts=self._experts,
            kv_cache=self._config.kv_cache,
            screens_logits=self._splits_unembedding and batch <= MAX_SCREENED_ROWS,  # the meter is greedy
        )
        limit, bound = limits.row_limit(cost, batch)
        speeds = [window.tokens_per_second for window in windows]
        return BenchRow(
            "decode",
            self._options.decode,
            depth,
            batch,
            context,
            *_median_low_high(speeds),
            limit=limit,
            bound=bound,
        )


def _by_batch(windows: list[DecodeWindow]) -> Iterator[list[DecodeWindow]]:
    for batch in sorted({window.num_sequences for window in windows}):
        yield [window for window in windows if window.num_sequences == batch]


def _median_low_high(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
