"""Engines over the fake runner, and what tests ask of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine, Request, TokenEvent
from harmonium.engine.adapters import ServedAdapter
from harmonium.engine.disk import BlockFiles
from harmonium.model.batch import SamplingParams
from tests.engine.fake_runner import FakeRunner


def make_engine(
    runner: FakeRunner | None = None,
    *,
    context_length: int = 1024,
    num_full_blocks: int = 64,
    num_window_blocks: int = 64,
    max_sequences: int = 8,
    max_batch_tokens: int = 512,
    max_queue: int = 256,
    prefix_cache: bool = True,
    speculation: str = "ngram",
    stall_seconds: float = 0.4,
    block_files: BlockFiles | None = None,
    adapters: Sequence[str] = (),
) -> LocalEngine:
    runner = runner or FakeRunner()
    runner.allocate_cache(num_full_blocks, num_window_blocks)
    return LocalEngine(
        runner,
        model_name="fake",
        context_length=context_length,
        num_full_blocks=num_full_blocks,
        num_window_blocks=num_window_blocks,
        config=EngineConfig(
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            max_queue=max_queue,
            prefix_cache=prefix_cache,
            speculation=speculation,  # type: ignore[arg-type]
            stall_seconds=stall_seconds,
        ),
        block_files=block_files,
        adapters=[ServedAdapter(name, index, f"digest of {name}") for index, name in enumerate(adapters)],
    )


def greedy(prompt: Sequence[int], max_tokens: int | None = 8, **fields: object) -> Request:
    """A greedy request; fields go to Request."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return Request("r", tuple(prompt), params, **fields)  # type: ignore[arg-type]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Token ids that look random."""
    return [(i * i * 31 + i * 7 + seed * 13 + (i * seed) % 11) % 97 for i in range(length)]


async def collect(engine: LocalEngine, request: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


async def answer(engine: LocalEngine, request: Request) -> list[int]:
    """The answer's token ids, with every law of an event stream asserted."""
    events = await collect(engine, request)
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason in ("stop", "length"), events[-1]
    assert all(event.tokens for event in events[:-1])
    return [token.token_id for event in events for token in event.tokens]


def serve(engine: LocalEngine, requests: Sequence[Request]) -> list[list[int]]:
    """All answers, the requests sent at once; the engine is closed and must have given every block back."""

    async def run() -> list[list[int]]:
        try:
            return list(await asyncio.gather(*(answer(engine, request) for request in requests)))
        finally:
            await engine.close()
            check_empty(engine)

    return asyncio.run(run())


def check_empty(engine: LocalEngine) -> None:
    """Nothing runs, waits or holds a block, and the books balance. For an engine that rests."""
    statistics = engine.statistics
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert (statistics.full_blocks_used, statistics.window_blocks_used) == (0, 0)
    engine._worker._scheduler.cache.check()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait in this thread; AssertionError when it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.001)
