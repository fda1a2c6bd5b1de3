"""The engine over the native runner, on tiny checkpoints in the true layout."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine, Request
from harmonium.engine.create import create_engine, plan_engine
from harmonium.errors import CheckpointError, ConfigError, MemoryPlanError
from harmonium.kernels.runtime import current_isa, current_threads
from harmonium.model.batch import SamplingParams
from harmonium.testing import make_tiny_checkpoint
from tests.engine.serving import answer, check_empty, wait_until

VOCABULARY_SIZE = 499


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    # A window longer than a block and no multiple of one.
    return make_tiny_checkpoint(folder, seed=5, vocabulary_size=VOCABULARY_SIZE, window=44)


def settings(**changes: object) -> EngineConfig:
    """bf16 weights: the arithmetic of a row is then the same whatever rows are computed with it."""
    fields = {"weights": "bf16", "context_length": 1024, "threads": 1, **changes}
    return EngineConfig(**fields)  # type: ignore[arg-type]


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[LocalEngine]:
    engine = create_engine(checkpoint, settings())
    yield engine
    asyncio.run(engine.close())


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist())


def request(token_ids: Sequence[int], max_tokens: int = 12, **sampling: object) -> Request:
    params = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
    return Request("r", tuple(token_ids), SamplingParams(**params))  # type: ignore[arg-type]


def answers(engine: LocalEngine, requests: Sequence[Request], at_once: bool = True) -> list[list[int]]:
    async def run() -> list[list[int]]:
        if at_once:
            return list(await asyncio.gather(*(answer(engine, item) for item in requests)))
        return [await answer(engine, item) for item in requests]

    return asyncio.run(run())


REQUESTS = [request(prompt(length, length)) for length in (1, 7, 33, 129, 300)]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Iterator[LocalEngine]:
    """An engine that serves one request at a time, computes prompts whole and caches nothing."""
    engine = create_engine(checkpoint, settings(prefix_cache=False))
    yield engine
    asyncio.run(engine.close())


def check_greedy(alone: LocalEngine, requests: Sequence[Request], tokens: Sequence[list[int]]) -> None:
    """Each token is the best by the logits of everything before it, computed at once.

    Logits spread over more than ten. The order of a sum differs between chunkings, which may flip a bf16
    rounding: a tie closer than 0.1 may fall either way.
    """
    for item, ours in zip(requests, tokens, strict=True):
        assert len(ours) == item.sampling.max_tokens
        logits = asyncio.run(alone.logits((*item.token_ids, *ours[:-1])))[len(item.token_ids) - 1 :]
        assert np.ptp(logits) > 10
        assert (logits.max(1) - logits[np.arange(len(ours)), ours] < 0.1).all()


def test_alone_equals_whole(alone: LocalEngine) -> None:
    check_greedy(alone, REQUESTS, answers(alone, REQUESTS, at_once=False))


def test_batched_equals_whole(engine: LocalEngine, alone: LocalEngine) -> None:
    check_greedy(alone, REQUESTS, answers(engine, REQUESTS))
    check_empty(engine)


@pytest.mark.parametrize("max_batch_tokens", [1, 10, 64])
def test_chunked_equals_whole(checkpoint: Path, alone: LocalEngine, max_batch_tokens: int) -> None:
    engine = create_engine(checkpoint, settings(max_batch_tokens=max_batch_tokens))
    check_greedy(alone, REQUESTS, answers(engine, REQUESTS))
    asyncio.run(engine.close())


def test_reused_prefix_equals_whole(engine: LocalEngine, alone: LocalEngine) -> None:
    answers(engine, REQUESTS)
    assert engine.statistics.num_prefix_hits == 0
    check_greedy(alone, REQUESTS, answers(engine, REQUESTS))
    assert engine.statistics.num_prefix_hits == 3  # prompts of 33, 129 and 300 tokens
    assert engine.statistics.num_cached_tokens == 32 + 128 + 288


def test_preempted_equals_whole(checkpoint: Path, alone: LocalEngine) -> None:
    requests = [request(prompt(60, seed), 150) for seed in range(4)]
    small = settings(context_length=256, max_sequences=4)
    plan = plan_engine(checkpoint, small)
    plan.checkpoint.close()
    limit = plan.memory.total_bytes - plan.memory.full_cache_bytes * 3 // 4 + 100_000
    engine = create_engine(checkpoint, replace(small, memory_limit_bytes=limit))
    check_greedy(alone, requests, answers(engine, requests))
    assert engine.statistics.num_preemptions > 0
    asyncio.run(engine.close())


def test_closing_the_generator_gives_every_block_back(engine: LocalEngine) -> None:
    async def run() -> None:
        for _ in range(10):
            events = engine.generate(request(prompt(100), 500))
            await anext(events)
            await events.aclose()
        await answer(engine, request(prompt(3), 1))

    asyncio.run(run())
    check_empty(engine)


def test_settings_reach_the_kernels_and_the_engine(checkpoint: Path) -> None:
    done: list[tuple[int, int]] = []
    engine = create_engine(
        checkpoint,
        settings(isa="scalar", threads=2, context_length=100),
        progress=lambda now, total: done.append((now, total)),
    )
    assert (current_isa(), current_threads()) == ("scalar", 2)
    assert engine.info.model_name == "tiny-model"
    assert (engine.info.context_length, engine.info.vocabulary_size) == (100, VOCABULARY_SIZE)
    assert done and done[-1][0] == done[-1][1]
    asyncio.run(engine.close())


def test_environment_settles_what_the_config_leaves_open(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARMONIUM_ISA", "scalar")
    monkeypatch.setenv("HARMONIUM_THREADS", "2")
    plan = plan_engine(checkpoint, EngineConfig(threads=1))
    plan.checkpoint.close()
    assert (plan.resolved.isa, plan.resolved.threads) == ("scalar", 1)


def test_plan_that_does_not_fit_is_refused_with_the_numbers(checkpoint: Path) -> None:
    with pytest.raises(MemoryPlanError, match=r"needs 0\.\d\d GB .* may use 0\.05 GB") as caught:
        create_engine(checkpoint, settings(memory_limit_bytes=50_000_000))
    assert caught.value.exit_code == 2


def test_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        create_engine(tmp_path / "nowhere")
    with pytest.raises((ConfigError, CheckpointError)):
        create_engine(tmp_path)


def test_storm_of_cancels_on_the_real_runner_gives_every_block_back(tmp_path: Path) -> None:
    """500 requests: readers leave after any event, tasks are cancelled at any point, the first included."""
    folder = make_tiny_checkpoint(tmp_path / "model", vocabulary_size=500)
    config = EngineConfig(context_length=512, max_sequences=8, max_batch_tokens=64, max_queue=1000)
    engine = create_engine(folder, config)
    rng = random.Random(1)

    async def read(number: int) -> None:
        prompt = tuple(rng.randrange(500) for _ in range(rng.choice([1, 5, 33, 200, 511])))
        sampling = SamplingParams(seed=number, max_tokens=rng.choice([1, 20, 300]), ignore_stop=True)
        async with aclosing(engine.generate(Request(f"r{number}", prompt, sampling))) as events:
            async for _ in events:
                if rng.random() < 0.1:
                    return

    async def storm() -> None:
        tasks = []
        for number in range(500):
            tasks.append(asyncio.create_task(read(number)))
            if rng.random() < 0.2:
                await asyncio.sleep(rng.random() * 0.01)
            if rng.random() < 0.5:
                rng.choice(tasks).cancel()
        for task in rng.sample(tasks, 200):
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
        await asyncio.to_thread(wait_until, lambda: engine.statistics.running == 0)
        check_empty(engine)
        await engine.close()

    asyncio.run(storm())
