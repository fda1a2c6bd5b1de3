from __future__ import annotations

import asyncio

import numpy as np
import pytest

from harmonium.engine.protocol import EngineInfo
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.errors import EngineError, PromptTooLong
from harmonium.meter import Meter

SECONDS = 0.01


def engine(context: int = 4096, **settings: object) -> ScriptedEngine:
    info = EngineInfo("scripted", context, 1000, engine="scripted")
    return ScriptedEngine([Script((7,) * 2000)], info=info, seconds_per_event=SECONDS, **settings)  # type: ignore[arg-type]


def test_prefill_is_the_time_to_the_first_token() -> None:
    async def measure() -> None:
        scripted = engine()
        seconds = await Meter(scripted, np.random.default_rng(0)).prefill_seconds(300)
        assert SECONDS * 0.9 < seconds < SECONDS * 20
        (request,) = scripted.requests
        assert len(request.token_ids) == 300
        assert len(set(request.token_ids)) > 200, "random tokens, so that no prefix is cached"
        assert scripted.running == 0

    asyncio.run(measure())


def test_decode_speed_grows_with_the_batch_where_a_step_costs_the_same() -> None:
    async def measure() -> None:
        scripted = engine()
        told: list[int] = []
        windows = await Meter(scripted, np.random.default_rng(0)).decode((1, 4, 2), 50, 8, 2, told.append)
        assert told == [4, 2, 1]
        assert [window.num_sequences for window in windows] == [4, 4, 2, 2, 1, 1]
        for window in windows:
            assert window.num_tokens == 8 * window.num_sequences
            # A step can be slower than the script says, on a busy machine, but never faster.
            assert window.tokens_per_second <= window.num_sequences / SECONDS * 1.15
            assert window.tokens_per_second > window.num_sequences / SECONDS / 20
        contexts = [window.context for window in windows]
        assert contexts == sorted(contexts) and 54 < contexts[0] < 70
        assert scripted.running == 0
        assert len({request.token_ids for request in scripted.requests}) == 4

    asyncio.run(measure())


def test_depth_zero_starts_with_one_token() -> None:
    async def measure() -> None:
        scripted = engine()
        await Meter(scripted, np.random.default_rng(0)).decode((1,), 0, 2, 1)
        assert len(scripted.requests[0].token_ids) == 1

    asyncio.run(measure())


def test_a_sequence_that_ends_while_measured_is_an_error_and_leaves_nothing_running() -> None:
    async def measure() -> None:
        scripted = engine(context=20)
        with pytest.raises(EngineError, match=r"ended \(length\) after 10 tokens .* context of 20"):
            await Meter(scripted, np.random.default_rng(0)).decode((2,), 10, 30, 1)
        assert scripted.running == 0

    asyncio.run(measure())


def test_engine_errors_come_through() -> None:
    async def measure() -> None:
        meter = Meter(engine(context=20), np.random.default_rng(0))
        with pytest.raises(PromptTooLong):
            await meter.prefill_seconds(100)
        with pytest.raises(PromptTooLong):
            await meter.decode((1, 2), 100, 4, 1)
        broken = ScriptedEngine([Script((), error="out of luck")])
        with pytest.raises(EngineError, match="out of luck"):
            await Meter(broken, np.random.default_rng(0)).prefill_seconds(3)
        with pytest.raises(EngineError, match="out of luck"):
            await Meter(broken, np.random.default_rng(0)).decode((1,), 3, 4, 1)

    asyncio.run(measure())
