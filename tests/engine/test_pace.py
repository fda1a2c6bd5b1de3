"""A long prompt holds nobody up for longer than asked, and gets on all the same."""

from __future__ import annotations

import asyncio

import pytest

from harmonium.config import EngineConfig
from harmonium.engine.pace import LEAST_TOKENS, PrefillPace
from harmonium.errors import ConfigError
from tests.engine.fake_runner import FakeRunner, expected_answer
from tests.engine.serving import greedy, make_engine, prompt_of, serve
from tests.engine.test_scheduler import Served


@pytest.mark.parametrize("tokens_per_second", [30.0, 200.0, 5000.0])
@pytest.mark.parametrize("fixed_seconds", [0.0, 0.1])
def test_limit_settles_where_a_step_takes_the_time_asked_for(
    tokens_per_second: float, fixed_seconds: float
) -> None:
    pace = PrefillPace(0.4, 4096)
    for _ in range(60):
        pace.settle(pace.limit, fixed_seconds + pace.limit / tokens_per_second)
    for _ in range(8):
        seconds = fixed_seconds + pace.limit / tokens_per_second
        assert 0.3 <= seconds <= 0.5
        pace.settle(pace.limit, seconds)


def test_limit_stays_between_its_ends() -> None:
    pace = PrefillPace(0.4, 100)
    for _ in range(50):
        pace.settle(pace.limit, 100.0)
    assert pace.limit == LEAST_TOKENS
    for _ in range(50):
        pace.settle(pace.limit, 0.0)
    assert pace.limit == 100
    assert PrefillPace(0.4, 4).limit == 4


def test_quick_step_with_little_to_do_moves_nothing() -> None:
    pace = PrefillPace(0.4, 100)
    before = pace.limit
    pace.settle(before - 1, 0.01)
    assert pace.limit == before
    pace.settle(before - 1, 0.8)
    assert pace.limit == before // 2


def test_prefill_is_limited_only_while_somebody_decodes() -> None:
    served = Served(max_batch_tokens=64)
    served.scheduler.pace = PrefillPace(0.4, 64)
    served.scheduler.pace.limit = 10
    first = served.add(prompt_of(60), 20)
    assert [chunk.num_tokens for chunk in served.scheduler.schedule()] == [60]
    served.step()
    late = served.add(prompt_of(50, 1), 5)
    chunks = served.scheduler.schedule()
    assert [(chunk.sequence, chunk.num_tokens) for chunk in chunks] == [(first, 1), (late, 10)]
    served.run()


def test_answers_are_the_same_and_the_engine_tells_the_pace() -> None:
    runner = FakeRunner(seconds_per_step=0.001)
    engine = make_engine(runner, max_batch_tokens=128, stall_seconds=1e-6)
    prompts = [prompt_of(40 + 90 * seed, seed) for seed in range(4)]
    pace = engine._worker._scheduler.pace
    assert serve(engine, [greedy(prompt, 30) for prompt in prompts]) == [
        expected_answer(prompt, 30) for prompt in prompts
    ]
    assert pace is not None and pace.limit <= 32


def test_zero_is_no_limit_and_nonsense_is_named() -> None:
    engine = make_engine(stall_seconds=0.0)
    assert engine._worker._scheduler.pace is None
    asyncio.run(engine.close())
    for value in (-1.0, float("nan"), 1e9):
        with pytest.raises(ConfigError, match=r"stall_seconds is .*; expected 0"):
            EngineConfig(stall_seconds=value)
