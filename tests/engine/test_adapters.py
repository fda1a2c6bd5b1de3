"""LoRA adapters in the engine: who gets which, and that no cached block serves another adapter."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.checkpoint.lora import open_lora
from harmonium.config import EngineConfig, LoraSource
from harmonium.engine import EngineInfo, LocalEngine, Request, ScriptedEngine, TokenEvent
from harmonium.engine.adapters import ServedAdapter, cache_key
from harmonium.engine.create import create_engine, plan_engine
from harmonium.errors import CheckpointError, ConfigError, MemoryPlanError, RequestError
from harmonium.model.batch import SamplingParams
from harmonium.model.native import NativeRunner
from harmonium.testing import make_tiny_checkpoint, tiny_config
from tests.engine.fake_runner import FakeRunner, expected_answer, last_hidden
from tests.engine.serving import answer, check_empty, collect, greedy, make_engine, prompt_of, serve
from tests.lora_files import make_lora

ADAPTERS = ("cat", "dog")
INDEX = {None: -1, "cat": 0, "dog": 1}
V = 499
SIZES = {"vocabulary_size": V, "window": 44}


def test_adapters_and_base_share_steps_and_do_not_mix() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, adapters=ADAPTERS)
    wanted = [(name, prompt_of(20 + 7 * i, i)) for i, name in enumerate([None, "cat", "dog", "cat", None])]
    answers = serve(engine, [greedy(prompt, 12, adapter=name) for name, prompt in wanted])
    assert answers == [expected_answer(prompt, 12, adapter=INDEX[name]) for name, prompt in wanted]
    mixed = [set(batch.adapter_S.tolist()) for batch in runner.batches if batch.adapter_S is not None]
    assert {-1, 0, 1} in mixed


def test_a_step_without_adapters_says_so() -> None:
    runner = FakeRunner()
    serve(make_engine(runner, adapters=ADAPTERS), [greedy(prompt_of(9)), greedy(prompt_of(40))])
    assert all(batch.adapter_S is None for batch in runner.batches)


def test_a_prefix_is_shared_within_an_adapter_and_with_no_other() -> None:
    engine = make_engine(adapters=ADAPTERS)
    prompt = prompt_of(200)

    async def run() -> None:
        for first in (True, False):
            for name in (None, *ADAPTERS):
                events = await collect(engine, greedy(prompt, 6, adapter=name))
                assert events[-1].num_cached_tokens == (0 if first else 192)
                tokens = [token.token_id for event in events for token in event.tokens]
                assert tokens == expected_answer(prompt, 6, adapter=INDEX[name])
        await engine.close()
        check_empty(engine)

    asyncio.run(run())


def test_no_salt_reaches_an_adapters_blocks() -> None:
    # A salt is any text that a client sends: also what an adapter's own key looks like.
    engine = make_engine(adapters=ADAPTERS)
    prompt = prompt_of(200)

    async def run() -> None:
        await answer(engine, greedy(prompt, 2, adapter="cat", cache_salt="s"))
        for salt in ("digest of cat\ns", "\ndigest of cat\ns", "digest of cat\n", "s"):
            events = await collect(engine, greedy(prompt, 2, cache_salt=salt))
            assert events[-1].num_cached_tokens == 0
        events = await collect(engine, greedy(prompt, 2, adapter="cat", cache_salt="s"))
        assert events[-1].num_cached_tokens == 192
        await engine.close()

    asyncio.run(run())


def test_keys_differ_where_adapter_or_salt_do() -> None:
    cat, dog = (ServedAdapter(name, i, f"{i:032x}") for i, name in enumerate(ADAPTERS))
    salts = ("", "s", "\n", f"{cat.digest}\n", f"\n{cat.digest}\n")
    keys = [cache_key(adapter, salt) for adapter in (None, cat, dog) for salt in salts]
    assert len(set(keys)) == len(keys)
    # The same content under another name may share.
    assert cache_key(cat, "s") == cache_key(ServedAdapter("tom", 5, cat.digest), "s")


def test_preempted_sequence_goes_on_with_its_adapter() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, adapters=ADAPTERS, num_full_blocks=20, context_length=256, max_sequences=6)
    rng = random.Random(3)
    wanted = [(rng.choice([None, *ADAPTERS]), prompt_of(rng.randrange(40, 110), i % 3)) for i in range(12)]

    async def run() -> list[list[int]]:
        requests = [greedy(prompt, 90, adapter=name) for name, prompt in wanted]
        answers = list(await asyncio.gather(*(answer(engine, request) for request in requests)))
        assert engine.statistics.num_preemptions > 0
        await engine.close()
        check_empty(engine)
        return answers

    expected = [expected_answer(prompt, 90, adapter=INDEX[name]) for name, prompt in wanted]
    assert asyncio.run(run()) == expected


def test_a_step_that_fails_is_repeated_with_each_sequences_adapter() -> None:
    def fail_together(batch: object) -> None:
        if len(batch.context_length_S) > 1:  # type: ignore[attr-defined]
            raise RuntimeError("together it fails")

    engine = make_engine(FakeRunner(before_step=fail_together), adapters=ADAPTERS)
    wanted = [(None, prompt_of(9)), ("cat", prompt_of(9)), ("dog", prompt_of(9))]
    answers = serve(engine, [greedy(prompt, 5, adapter=name) for name, prompt in wanted])
    assert answers == [expected_answer(prompt, 5, adapter=INDEX[name]) for name, prompt in wanted]


def test_logits_and_scores_are_those_of_the_adapter() -> None:
    engine = make_engine(adapters=ADAPTERS)
    prompt = tuple(prompt_of(50))

    async def run() -> None:
        logits = {name: await engine.logits(prompt, name) for name in INDEX}
        assert not np.array_equal(logits["cat"], logits["dog"])
        assert not np.array_equal(logits["cat"], logits[None])
        scores = {name: await engine.score(prompt, 1, name) for name in INDEX}
        assert len({tuple(token.top_logprobs for token in score) for score in scores.values()}) == 3
        with pytest.raises(RequestError, match="no adapter 'cow'"):
            await engine.logits(prompt, "cow")
        await engine.close()

    asyncio.run(run())
    assert len({last_hidden(prompt, adapter=index)[-1] for index in INDEX.values()}) == 3


def test_an_unknown_adapter_is_refused_by_every_engine() -> None:
    async def run() -> None:
        engine = make_engine(adapters=ADAPTERS)
        with pytest.raises(RequestError, match="there is no adapter 'cow'; there is cat, dog"):
            engine.admit(greedy([1], adapter="cow"))
        with pytest.raises(RequestError, match="no adapter 'cow'"):
            await collect(engine, greedy([1], adapter="cow"))
        await engine.close()
        scripted = ScriptedEngine([[1]])
        with pytest.raises(RequestError, match="there is no adapter 'cat'; there is none"):
            scripted.admit(greedy([1], adapter="cat"))
        info = EngineInfo("scripted", 100, 99, "scripted", ("cat",))
        ScriptedEngine([[1]], info=info).admit(greedy([1], adapter="cat"))

    asyncio.run(run())


# ---- over the native runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", seed=5, **SIZES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraSource, ...]:
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny_config(**SIZES)
    cat = make_lora(folder / "cat", model, seed=1)
    return LoraSource("cat", cat), LoraSource("dog", make_lora(folder / "dog", model, seed=2, dtype="BF16"))


def settings(**changes: object) -> EngineConfig:
    return EngineConfig(**{"context_length": 512, "threads": 1, **changes})  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, V, length).tolist())


def test_native_adapters_in_one_batch_answer_as_alone(
    checkpoint: Path, sources: tuple[LoraSource, ...]
) -> None:
    engine = create_engine(checkpoint, settings(lora=sources))
    assert engine.info.adapters == ADAPTERS
    params = SamplingParams(temperature=0, max_tokens=10)
    # The same prompt for all, longer than several blocks: what they could mix up is the cache.
    requests = [Request("r", prompt(100), params, adapter=name) for name in (None, *ADAPTERS)]

    async def run(engine: LocalEngine) -> tuple[list[list[int]], list[list[int]]]:
        one_by_one = [await answer(engine, request) for request in requests * 2]
        together = list(await asyncio.gather(*(answer(engine, request) for request in requests * 2)))
        await engine.close()
        return one_by_one, together

    one_by_one, together = asyncio.run(run(engine))
    assert one_by_one == together
    assert len({tuple(tokens) for tokens in together}) == 3
    base = create_engine(checkpoint, settings())
    assert asyncio.run(_first(base, requests[0])) == together[0]


async def _first(engine: LocalEngine, request: Request) -> list[int]:
    try:
        return await answer(engine, request)
    finally:
        await engine.close()


def test_blocks_on_disk_serve_the_same_adapter_and_no_other(
    checkpoint: Path, sources: tuple[LoraSource, ...], tmp_path: Path
) -> None:
    cat, dog = sources
    params = SamplingParams(temperature=0, max_tokens=3)
    first: list[list[int]] = []
    # The name stays; what stands behind it is another adapter in the second run.
    for source, num_cached in ((cat, 0), (LoraSource("cat", dog.path), 0), (cat, 96)):
        engine = create_engine(checkpoint, settings(lora=(source,), cache_dir=str(tmp_path / "cache")))
        request = Request("r", prompt(100), params, adapter="cat")
        events = asyncio.run(_events(engine, request))
        assert events[-1].num_cached_tokens == num_cached
        first.append([token.token_id for event in events for token in event.tokens])
    assert first[0] == first[2] != first[1]


async def _events(engine: LocalEngine, request: Request) -> list[TokenEvent]:
    try:
        return await collect(engine, request)
    finally:
        await engine.close()


def test_what_is_wrong_with_an_adapter_begins_with_its_name(
    checkpoint: Path, sources: tuple[LoraSource, ...], tmp_path: Path
) -> None:
    other = make_lora(tmp_path / "other", tiny_config(vocabulary_size=V, hidden_size=128))
    with pytest.raises(CheckpointError, match=r"^adapter 'cow': .*has shape \[3, 128\]"):
        plan_engine(checkpoint, settings(lora=(*sources, LoraSource("cow", other))))
    with pytest.raises(ConfigError, match=r"^adapter 'cow': .*no: does not exist"):
        plan_engine(checkpoint, settings(lora=(LoraSource("cow", tmp_path / "no"),)))
    broken = make_lora(tmp_path / "broken", tiny_config(**SIZES))
    weights = broken / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = np.array([np.nan], "<f4").tobytes()
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^adapter 'cow': .*holds nan at"):
        create_engine(checkpoint, settings(lora=(LoraSource("cow", broken),)))


def test_the_plan_counts_adapters(checkpoint: Path, sources: tuple[LoraSource, ...]) -> None:
    one = settings(max_sequences=1)  # the cache then holds one context at any limit
    plain, plan = plan_engine(checkpoint, one), plan_engine(checkpoint, replace(one, lora=sources))
    added = plan.memory.total_bytes - plain.memory.total_bytes
    assert added == plan.memory.adapter_bytes > 0
    with open_checkpoint(checkpoint) as opened:
        loaded = [open_lora(source.path, opened.config).load() for source in sources]
        runner = NativeRunner(opened, adapters=loaded)
        inner_bytes = 4 * 512 * opened.config.num_active_experts * 3
        assert plan.memory.adapter_bytes == runner.adapter_bytes + inner_bytes
        runner.close()
    limit = plain.memory.total_bytes + added // 2
    with pytest.raises(MemoryPlanError, match=r"fewer adapters \(they take"):
        plan_engine(checkpoint, replace(one, lora=sources, memory_limit_bytes=limit))
    plain.close()
    plan.close()


@pytest.mark.parametrize("name", ["", "a b", "a\nb", ".hidden", "a" * 129, "ü"])
def test_names_that_no_request_should_carry_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="adapter name is"):
        LoraSource(name, Path("x"))


def test_two_adapters_have_two_names() -> None:
    source = LoraSource("cat", Path("x"))
    with pytest.raises(ConfigError, match="two adapters are called 'cat'"):
        EngineConfig(lora=(source, source))
    many = tuple(LoraSource(f"a{i}", Path("x")) for i in range(65))
    with pytest.raises(ConfigError, match="there are 65 adapters; expected at most 64"):
        EngineConfig(lora=many)
