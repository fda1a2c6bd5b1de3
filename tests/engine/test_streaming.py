"""Engines whose experts are streamed: the answers of mapped ones, and failures that end requests alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine, Request
from harmonium.engine.create import create_engine, plan_engine
from harmonium.model.batch import SamplingParams
from harmonium.model.streaming_memory import slot_bytes
from harmonium.testing import make_tiny_checkpoint, tiny_config
from tests.engine.serving import answer, check_empty, collect

VOCABULARY_SIZE = 499
SIZES = {"num_experts": 12, "num_active_experts": 3}
SLOT = slot_bytes(tiny_config(**SIZES))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    return make_tiny_checkpoint(folder, seed=5, vocabulary_size=VOCABULARY_SIZE, **SIZES)


def engine_of(checkpoint: Path, num_slots: int, **changes: object) -> LocalEngine:
    """0 slots: mapped. bf16 weights: a row's arithmetic is then the same whatever is computed with it."""
    fields: dict[str, object] = {"weights": "bf16", "context_length": 256, "threads": 1, "experts": "mapped"}
    if num_slots:
        fields |= {"experts": "streamed", "expert_memory_bytes": num_slots * SLOT}
    return create_engine(checkpoint, EngineConfig(**{**fields, **changes}))  # type: ignore[arg-type]


def request(seed: int, length: int = 30, max_tokens: int = 12) -> Request:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()
    return Request(f"r{seed}", tuple(ids), SamplingParams(temperature=0, max_tokens=max_tokens))


def answers(engine: LocalEngine, requests: Sequence[Request]) -> list[list[int]]:
    async def run() -> list[list[int]]:
        try:
            return list(await asyncio.gather(*(answer(engine, item) for item in requests)))
        finally:
            await engine.close()
            check_empty(engine)

    return asyncio.run(run())


@pytest.mark.parametrize("num_slots", [6, 25, 72])
def test_answers_are_those_of_mapped_experts(checkpoint: Path, num_slots: int) -> None:
    requests = [request(seed, 10 + 15 * seed) for seed in range(5)]
    mapped = engine_of(checkpoint, 0)
    assert mapped.statistics.experts is None
    expected = answers(mapped, requests)
    streaming = engine_of(checkpoint, num_slots)
    assert answers(streaming, requests) == expected
    counts = streaming.statistics.experts
    assert counts is not None and counts.hits + counts.late_hits + counts.misses > 0 and counts.bytes_read > 0


def test_streaming_takes_long_steps_and_keeps_no_pace(checkpoint: Path) -> None:
    plan = plan_engine(checkpoint, EngineConfig(context_length=256, threads=1, experts="streamed"))
    plan.close()
    assert plan.memory.num_expert_slots == 72, "every expert has a slot where there is room"
    assert plan.resolved.config.stall_seconds == 0.0
    assert plan.resolved.config.max_batch_tokens == plan.memory.max_batch_tokens == 4096


def test_cancelled_requests_leave_nothing(checkpoint: Path) -> None:
    async def read(engine: LocalEngine, number: int) -> None:
        async with aclosing(engine.generate(request(number, max_tokens=40))) as events:
            left = random.Random(number).randint(1, 6)
            async for _ in events:
                left -= 1
                if not left:
                    return

    async def storm() -> list[int]:
        engine = engine_of(checkpoint, 7, speculation="off")
        await asyncio.gather(*(read(engine, number) for number in range(24)))
        tokens = await answer(engine, request(99))
        await engine.close()
        check_empty(engine)
        return tokens

    tokens = asyncio.run(asyncio.wait_for(storm(), 120))
    assert [tokens] == answers(engine_of(checkpoint, 0), [request(99)])


def test_file_that_is_shortened_ends_requests_and_not_the_engine(tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path / "model", vocabulary_size=VOCABULARY_SIZE, num_shards=2, **SIZES)

    async def run() -> None:
        engine = engine_of(path, 6, prefix_cache=False)
        expected = await answer(engine, request(1))
        file = path / "model-00002-of-00002.safetensors"
        whole = file.read_bytes()
        with file.open("r+b") as opened:
            opened.truncate(len(whole) // 2)
        event = (await collect(engine, request(1)))[-1]
        assert event.finish_reason == "error" and event.error is not None
        assert event.error.startswith("CheckpointError:") and "has been shortened to" in event.error
        with file.open("r+b") as opened:
            opened.write(whole)
        assert await answer(engine, request(1)) == expected
        await engine.close()
        check_empty(engine)

    asyncio.run(asyncio.wait_for(run(), 120))


def test_disk_that_fails_ends_requests_and_not_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    async def run() -> None:
        engine = engine_of(checkpoint, 6, prefix_cache=False)
        expected = await answer(engine, request(1))
        with monkeypatch.context() as patch:
            patch.setattr("os.preadv", fail)
            events = await asyncio.gather(*(collect(engine, request(seed)) for seed in range(3)))
        for listed in events:
            assert listed[-1].finish_reason == "error" and "cannot be read at byte" in str(listed[-1].error)
        assert await answer(engine, request(1)) == expected
        await engine.close()
        check_empty(engine)

    asyncio.run(asyncio.wait_for(run(), 120))
