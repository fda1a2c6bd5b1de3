"""LoRA adapters that come and go while an engine serves."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from harmonium.config import LoraSource
from harmonium.engine import LocalEngine, Request
from harmonium.engine.adapters import AdapterTable, ServedAdapter
from harmonium.engine.create import create_engine
from harmonium.engine.protocol import AdapterHost
from harmonium.engine.scheduler import Scheduler
from harmonium.errors import (
    CheckpointError,
    ConfigError,
    EngineClosed,
    EngineError,
    MemoryPlanError,
    RequestError,
)
from harmonium.model.batch import SamplingParams
from harmonium.testing import make_tiny_checkpoint, tiny_config
from tests.engine.fake_runner import FakeRunner, expected_answer, fake_config
from tests.engine.serving import answer, check_empty, collect, greedy, make_engine, prompt_of
from tests.engine.test_adapters import SIZES, prompt, settings
from tests.lora_files import make_lora


@pytest.fixture
def source(tmp_path: Path) -> LoraSource:
    return LoraSource("cat", make_lora(tmp_path / "cat", fake_config()))


async def rest(engine: LocalEngine) -> None:
    """Wait until the engine's thread has done what was asked of it before."""
    await asyncio.wrap_future(engine._worker.between_steps(lambda _: True))


def test_an_adapter_serves_from_its_loading_to_its_unloading(source: LoraSource) -> None:
    runner = FakeRunner()

    async def run() -> None:
        engine = make_engine(runner)
        assert isinstance(engine, AdapterHost)
        for _ in range(2):
            with pytest.raises(RequestError, match="no adapter 'cat'"):
                engine.admit(greedy([1], adapter="cat"))
            await engine.load_adapter(source)
            assert engine.info.adapters == ("cat",)
            answers = [await answer(engine, greedy(prompt_of(50), 5, adapter=name)) for name in ("cat", None)]
            assert answers == [expected_answer(prompt_of(50), 5, adapter=index) for index in (0, -1)]
            await engine.unload_adapter("cat")
            assert engine.info.adapters == ()
            await rest(engine)
            assert runner.adapters == {0: None}
        await engine.close()
        check_empty(engine)

    asyncio.run(run())


def test_a_running_answer_keeps_its_adapter_to_its_end(source: LoraSource) -> None:
    # The fake runner refuses a step that names an adapter which was dropped.
    runner = FakeRunner(seconds_per_step=0.002)

    async def run() -> None:
        engine = make_engine(runner)
        await engine.load_adapter(source)
        events = engine.generate(greedy(prompt_of(30), 40, adapter="cat"))
        tokens = [token.token_id for token in (await anext(events)).tokens]
        await engine.unload_adapter("cat")
        with pytest.raises(RequestError, match="no adapter 'cat'"):
            await collect(engine, greedy([1], adapter="cat"))
        # Its name is free at once, its place is not.
        await engine.load_adapter(source)
        assert runner.adapters[0] is not None and runner.adapters[1] is not None
        async for event in events:
            tokens += [token.token_id for token in event.tokens]
        assert tokens == expected_answer(prompt_of(30), 40, adapter=0)
        await rest(engine)
        assert runner.adapters[0] is None
        # Another prompt: the fake runner's values depend on the place, which no prefix knows.
        assert await answer(engine, greedy(prompt_of(30, 1), 5, adapter="cat")) == expected_answer(
            prompt_of(30, 1), 5, adapter=1
        )
        await engine.close()
        check_empty(engine)

    asyncio.run(run())


def test_aborted_answers_let_go_of_their_adapter(source: LoraSource) -> None:
    runner = FakeRunner(seconds_per_step=0.001)

    async def run() -> None:
        engine = make_engine(runner)
        await engine.load_adapter(source)
        streams = [engine.generate(greedy(prompt_of(30, i), None, adapter="cat")) for i in range(4)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        await engine.unload_adapter("cat")
        for stream in streams:
            await stream.aclose()
        await asyncio.wrap_future(engine._worker.between_steps(lambda _: runner.adapters[0] is None))
        await engine.close()
        check_empty(engine)

    asyncio.run(run())


def test_many_come_and_go_under_load(tmp_path: Path) -> None:
    runner = FakeRunner(seconds_per_step=0.0005)
    sources = [LoraSource(f"a{i}", make_lora(tmp_path / f"a{i}", fake_config(), seed=i)) for i in range(5)]

    async def one(engine: LocalEngine, source: LoraSource, seed: int) -> None:
        for turn in range(4):
            await engine.load_adapter(source)
            table = {adapter.name: adapter.index for adapter in engine._adapters.held}
            wanted = prompt_of(40 + turn, seed)
            answers = await asyncio.gather(
                *(answer(engine, greedy(wanted, 6, adapter=name)) for name in (source.name, None))
            )
            # Which place it has decides what the fake model answers.
            assert answers[1] == expected_answer(wanted, 6)
            assert answers[0] == expected_answer(wanted, 6, adapter=table[source.name])
            await engine.unload_adapter(source.name)

    async def run() -> None:
        # Blocks computed at one place would answer wrongly at another, where the digest is the same.
        engine = make_engine(runner, prefix_cache=False)
        await asyncio.gather(*(one(engine, source, seed) for seed, source in enumerate(sources)))
        await rest(engine)
        assert all(adapter is None for adapter in runner.adapters.values())
        await engine.close()
        check_empty(engine)

    asyncio.run(run())


def test_what_cannot_be_loaded_changes_nothing(source: LoraSource, tmp_path: Path) -> None:
    async def run() -> None:
        engine = make_engine()
        with pytest.raises(ConfigError, match="does not exist"):
            await engine.load_adapter(LoraSource("dog", tmp_path / "no"))
        other = make_lora(tmp_path / "other", tiny_config(vocabulary_size=97))
        with pytest.raises(CheckpointError, match="is for layer 3; the model has 3"):
            await engine.load_adapter(LoraSource("dog", other))
        await engine.load_adapter(source)
        with pytest.raises(ConfigError, match="there is an adapter 'cat' already"):
            await engine.load_adapter(source)
        with pytest.raises(RequestError, match="there is no adapter 'dog'"):
            await engine.unload_adapter("dog")
        assert engine.info.adapters == ("cat",)
        await engine.close()
        for update in (engine.load_adapter(LoraSource("dog", source.path)), engine.unload_adapter("cat")):
            with pytest.raises(EngineClosed):
                await update

    asyncio.run(run())


def test_an_engine_that_breaks_meanwhile_says_so(source: LoraSource, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        entered.set()
        go_on.wait(10)

    def break_down(*_: object) -> None:
        raise RuntimeError("the books are wrong")

    async def run() -> None:
        engine = make_engine(FakeRunner(before_step=hold))
        monkeypatch.setattr(engine._worker._scheduler, "commit", break_down)
        running = asyncio.create_task(collect(engine, greedy([1, 2])))
        await asyncio.to_thread(entered.wait, 10)
        loading = asyncio.create_task(engine.load_adapter(source))
        while not engine._worker._jobs:
            await asyncio.sleep(0.001)
        go_on.set()
        with pytest.raises(EngineClosed, match="was closed before the adapter was there"):
            await loading
        assert (await running)[-1].finish_reason == "error"
        await engine.close()

    asyncio.run(run())


def test_a_runner_without_adapters_takes_none(source: LoraSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeRunner, "set_adapter")

    async def run() -> None:
        engine = make_engine()
        with pytest.raises(EngineError, match="takes no adapters while it serves"):
            await engine.load_adapter(source)
        await engine.close()

    asyncio.run(run())


def test_places_are_used_again_and_counted() -> None:
    table = AdapterTable(ServedAdapter(str(i), i, "") for i in range(64))
    with pytest.raises(ConfigError, match="there are 64 adapters; expected at most 64"):
        table.free_index("x")
    with table.using("7") as adapter:
        assert adapter is not None and adapter.index == 7
        assert table.retire("7") is adapter
        assert table.is_awaited(adapter)
    assert not table.is_awaited(adapter)
    assert len(table.names) == 63 and len(table.held) == 64
    table.forget(adapter)
    assert table.free_index("x") == 7
    with pytest.raises(RequestError, match="no adapter '7' any more"), table.using("7"):
        pass


# ---- over the native runner


def test_native_steps_go_on_with_what_is_loaded(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", seed=5, **SIZES)
    sources = [
        LoraSource(name, make_lora(tmp_path / name, tiny_config(**SIZES), seed=seed))
        for seed, name in enumerate(("cat", "dog"))
    ]

    def request(name: str | None) -> Request:
        return Request("r", prompt(70), SamplingParams(temperature=0, max_tokens=6), adapter=name)

    async def served(engine: LocalEngine, *names: str | None) -> list[list[int]]:
        return list(await asyncio.gather(*(answer(engine, request(name)) for name in names)))

    async def run() -> None:
        engine = await asyncio.to_thread(create_engine, checkpoint, settings(lora=tuple(sources)))
        expected = dict(zip((None, "cat", "dog"), await served(engine, None, "cat", "dog"), strict=True))
        await engine.close()
        engine = await asyncio.to_thread(create_engine, checkpoint, settings())
        runner: Any = engine._worker._runner
        assert await served(engine, None) == [expected[None]]
        assert runner.adapter_bytes == 0
        for source in sources:
            await engine.load_adapter(source)
        assert await served(engine, "dog", None, "cat") == [expected[name] for name in ("dog", None, "cat")]
        await engine.unload_adapter("cat")
        assert await served(engine, "dog", None) == [expected["dog"], expected[None]]
        await engine.unload_adapter("dog")
        await rest(engine)
        assert runner.adapter_bytes == 0
        await engine.close()

    asyncio.run(run())


def test_one_is_loaded_while_the_last_is_about_to_leave(tmp_path: Path) -> None:
    """Its place is chosen while the other's is still taken, and filled when the runner holds none."""
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", seed=5, **SIZES)
    source = LoraSource("cat", make_lora(tmp_path / "cat", tiny_config(**SIZES)))
    request = Request("r", prompt(70), SamplingParams(temperature=0, max_tokens=6), adapter="cat")

    async def run() -> None:
        engine = await asyncio.to_thread(create_engine, checkpoint, settings())
        await engine.load_adapter(source)
        expected = await answer(engine, request)
        stopped, may_go_on = threading.Event(), threading.Event()

        def stop(_: Scheduler) -> bool:
            stopped.set()
            return may_go_on.wait(timeout=60)

        engine._worker.between_steps(stop)
        assert await asyncio.to_thread(stopped.wait, 60)
        await engine.unload_adapter("cat")
        loading = asyncio.create_task(engine.load_adapter(source))
        while not engine._worker._jobs[1:]:  # the one that drops the first, and the one that puts the second
            await asyncio.sleep(0.01)
        may_go_on.set()
        await loading
        assert await answer(engine, request) == expected
        await engine.close()

    asyncio.run(run())


def test_an_adapter_that_memory_is_too_small_for_is_refused(source: LoraSource) -> None:
    async def run() -> None:
        runner = FakeRunner()
        runner.allocate_cache(64, 64)
        engine = LocalEngine(
            runner,
            model_name="fake",
            context_length=1024,
            num_full_blocks=64,
            num_window_blocks=64,
            adapter_limit_bytes=100_000,
        )
        with pytest.raises(MemoryPlanError, match=r"the adapters need .* bytes; there are 100,000 for them"):
            await engine.load_adapter(source)
        assert engine.info.adapters == ()
        await engine.close()

    asyncio.run(run())
