"""Requests that come and go while a model runs: queues, readers that leave, failures, the end."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from contextlib import aclosing
from pathlib import Path

import pytest

from harmonium.errors import EngineBusy, EngineClosed
from harmonium.model.batch import Batch
from tests.engine.fake_runner import FakeRunner, expected_answer
from tests.engine.serving import (
    answer,
    check_empty,
    collect,
    greedy,
    make_engine,
    prompt_of,
    serve,
    wait_until,
)


class Gate:
    """A before_step that holds the runner in a step until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.entered.set()
        assert self.opened.wait(10)


def test_full_queue_refuses_with_engine_busy() -> None:
    gate = Gate()
    engine = make_engine(FakeRunner(before_step=gate), max_sequences=1, max_queue=2)

    async def run() -> None:
        tasks = [asyncio.create_task(answer(engine, greedy(prompt_of(5, i), 2))) for i in range(3)]
        await asyncio.to_thread(gate.entered.wait)
        with pytest.raises(EngineBusy, match="3 requests run or wait; the limit is 3") as caught:
            engine.admit(greedy([1]))
        assert caught.value.retry_after_seconds > 0
        with pytest.raises(EngineBusy):
            await collect(engine, greedy([1]))
        # A request that leaves the queue makes room at once, though the step under way has not ended.
        tasks[2].cancel()
        await asyncio.wait(tasks[2:])
        engine.admit(greedy([1]))
        gate.opened.set()
        assert await asyncio.gather(*tasks[:2]) == [expected_answer(prompt_of(5, i), 2) for i in range(2)]
        await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("place", ["queue", "prefill", "decode"])
def test_closing_the_generator_gives_every_block_back(place: str) -> None:
    """Readers leave in the queue, in prefill of a long prompt, in decode; 100 times each."""
    runner = FakeRunner()
    engine = make_engine(runner, max_sequences=2, max_batch_tokens=16, prefix_cache=place == "decode")
    prompt = prompt_of(6 if place == "decode" else 400)

    async def leave(i: int) -> None:
        events = engine.generate(greedy([*prompt, i % 97], None))
        if place == "decode":
            await anext(events)
            await anext(events)
            await events.aclose()
        else:
            task = asyncio.create_task(anext(events))
            await asyncio.sleep(0.001 * (i % 3))
            task.cancel()
            await asyncio.wait([task])

    async def run() -> None:
        for i in range(0, 100, 4):
            await asyncio.gather(*(leave(i + k) for k in range(4 if place == "queue" else 2)))
            if place != "queue":
                await asyncio.gather(*(leave(i + k) for k in (2, 3)))
        await asyncio.to_thread(wait_until, lambda: engine.statistics.full_blocks_used == 0)
        check_empty(engine)
        assert await answer(engine, greedy(prompt, 5)) == expected_answer(prompt, 5)
        await engine.close()

    asyncio.run(run())
    assert engine.statistics.finished == {"aborted": 100, "length": 1}


def test_reader_that_leaves_during_a_step_frees_its_blocks_before_the_next() -> None:
    gate = Gate()
    runner = FakeRunner(before_step=gate)
    engine = make_engine(runner)

    async def run() -> None:
        leaver = asyncio.create_task(answer(engine, greedy(prompt_of(100), None)))
        await asyncio.to_thread(gate.entered.wait)
        stayer = asyncio.create_task(answer(engine, greedy(prompt_of(10), 3)))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.wait([leaver])
        gate.opened.set()
        await stayer
        await engine.close()

    asyncio.run(run())
    assert [len(batch.context_length_S) for batch in runner.batches] == [1, 1, 1, 1]


def test_reader_that_leaves_in_the_step_that_ends_its_answer_harms_nobody() -> None:
    gate = Gate()
    engine = make_engine(FakeRunner(before_step=gate))

    async def run() -> None:
        leaver = asyncio.create_task(answer(engine, greedy([1], 1)))
        await asyncio.to_thread(gate.entered.wait)
        leaver.cancel()
        await asyncio.wait([leaver])
        gate.opened.set()
        assert await answer(engine, greedy([2], 3)) == expected_answer([2], 3)
        await engine.close()

    asyncio.run(run())
    assert engine.statistics.finished == {"aborted": 1, "length": 1}


def test_failing_request_ends_with_error_and_others_go_on() -> None:
    def before_step(batch: Batch) -> None:
        if 66 in batch.token_id_T[:20]:
            raise ValueError("token 66 is poison")

    # The answers of the good ones hold no 66 at the places looked at: fixed prompts.
    runner = FakeRunner(before_step=before_step)
    engine = make_engine(runner)
    good = [[1, 2, 3], [4, 5, 6]]

    async def run() -> None:
        events = await asyncio.gather(
            collect(engine, greedy(good[0], 1)),
            collect(engine, greedy([66], 5)),
            collect(engine, greedy(good[1], 1)),
        )
        assert events[1][-1].finish_reason == "error"
        assert events[1][-1].error == "ValueError: token 66 is poison"
        for i, prompt in zip((0, 2), good, strict=True):
            assert [t.token_id for e in events[i] for t in e.tokens] == expected_answer(prompt, 1)
        assert await answer(engine, greedy([9], 1)) == expected_answer([9], 1)
        await engine.close()
        check_empty(engine)

    asyncio.run(run())
    assert engine.statistics.finished == {"length": 3, "error": 1}


def test_step_that_fails_once_is_repeated_with_the_same_tokens() -> None:
    failures = iter([False, False, True, False])

    def before_step(batch: Batch) -> None:
        if len(batch.context_length_S) == 3 and next(failures, False):
            raise RuntimeError("once")

    prompts = [prompt_of(20, seed) for seed in range(3)]
    answers = serve(
        make_engine(FakeRunner(before_step=before_step)), [greedy(prompt, 12) for prompt in prompts]
    )
    assert answers == [expected_answer(prompt, 12) for prompt in prompts]


def test_defect_of_the_engine_ends_every_request_with_error_and_closes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = FakeRunner()
    engine = make_engine(runner)

    def break_down(*arguments: object) -> None:
        raise AssertionError("books are wrong")

    monkeypatch.setattr(engine._worker._scheduler, "schedule", break_down)

    async def run() -> None:
        events = await asyncio.gather(
            *(collect(engine, greedy([i])) for i in range(3)), return_exceptions=True
        )
        for got in events:
            if not isinstance(got, BaseException):
                assert (got[-1].finish_reason, got[-1].error) == ("error", "AssertionError: books are wrong")
            else:
                assert isinstance(got, EngineClosed)
        assert any(isinstance(got, list) for got in events)
        with pytest.raises(EngineClosed, match="has stopped: AssertionError: books are wrong"):
            engine.admit(greedy([1]))
        await engine.close()

    asyncio.run(run())
    assert runner.is_closed


def test_close_ends_what_runs_and_waits_with_aborted() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, max_sequences=2)

    async def run() -> None:
        tasks = [asyncio.create_task(collect(engine, greedy(prompt_of(5, i), None))) for i in range(4)]
        await asyncio.to_thread(wait_until, lambda: engine.statistics.num_steps > 3)
        await engine.close()
        for events in await asyncio.gather(*tasks):
            assert events[-1].finish_reason in ("aborted", "length")
            assert sum(event.finish_reason is not None for event in events) == 1
        assert runner.is_closed and not engine._worker._thread.is_alive()
        await engine.close()
        with pytest.raises(EngineClosed):
            engine.admit(greedy([1]))
        with pytest.raises(EngineClosed):
            await collect(engine, greedy([1]))

    asyncio.run(run())
    check_empty(engine)
    assert engine.statistics.finished["aborted"] >= 2


def test_engine_that_is_dropped_closes_itself() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    thread = engine._worker._thread
    asyncio.run(collect(engine, greedy([1])))
    del engine
    gc.collect()
    thread.join(10)
    assert runner.is_closed and not thread.is_alive()


def test_program_that_ends_without_close_ends() -> None:
    program = """
import asyncio
from tests.engine.fake_runner import FakeRunner
from tests.engine.serving import greedy, make_engine
engine = make_engine(FakeRunner(seconds_per_step=0.01), context_length=1024)
events = engine.generate(greedy([1], None))
loop = asyncio.new_event_loop()
loop.run_until_complete(anext(events))
print("one token")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout == "one token\n" and "rror" not in done.stderr


def test_statistics_count_what_was_computed() -> None:
    engine = make_engine()

    async def run() -> None:
        for _ in range(2):
            await answer(engine, greedy(prompt_of(100), 10))
        await engine.close()

    asyncio.run(run())
    statistics = engine.statistics
    assert statistics.num_prefill_tokens == 100 + 100 - 96
    assert statistics.num_answer_tokens == 20
    assert (statistics.num_prefix_hits, statistics.num_cached_tokens) == (1, 96)
    assert statistics.num_steps == 20
    assert statistics.finished == {"length": 2}
    assert statistics.full_blocks_cached == 3 and statistics.full_blocks_free == 61


def test_dropped_generators_leak_nothing() -> None:
    engine = make_engine()

    async def run() -> None:
        engine.generate(greedy([1]))  # never started
        started = engine.generate(greedy([2], None))
        await anext(started)
        del started
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.to_thread(wait_until, lambda: engine.statistics.full_blocks_used == 0)

    asyncio.run(run())
    check_empty(engine)
    asyncio.run(engine.close())


def test_loop_that_is_closed_under_a_reader_frees_its_blocks() -> None:
    engine = make_engine(FakeRunner(seconds_per_step=0.002))
    loop = asyncio.new_event_loop()
    events = engine.generate(greedy([2], None))
    loop.run_until_complete(anext(events))
    loop.close()
    wait_until(lambda: engine.statistics.running == 0)
    check_empty(engine)
    with pytest.raises(StopIteration):
        events.aclose().send(None)
    asyncio.run(engine.close())


def test_several_loops_in_several_threads_share_one_engine() -> None:
    engine = make_engine()
    answers: dict[int, list[int]] = {}

    def use(seed: int) -> None:
        answers[seed] = asyncio.run(answer(engine, greedy(prompt_of(50, seed), 30)))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {seed: expected_answer(prompt_of(50, seed), 30) for seed in range(5)}
    asyncio.run(engine.close())


def test_slow_reader_holds_nobody_up_and_misses_nothing() -> None:
    engine = make_engine()

    async def run() -> None:
        async with aclosing(engine.generate(greedy([5], 100))) as slow:
            tokens = [t.token_id for t in (await anext(slow)).tokens]
            assert await answer(engine, greedy([6], 100)) == expected_answer([6], 100)
            await asyncio.to_thread(wait_until, lambda: engine.statistics.running == 0)
            last = await anext(slow)  # all that gathered, in one event
            assert last.finish_reason == "length"
            assert tokens + [t.token_id for t in last.tokens] == expected_answer([5], 100)
        await engine.close()

    asyncio.run(run())
