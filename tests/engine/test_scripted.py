from __future__ import annotations

import asyncio

import pytest

from harmonium.engine import Engine, EngineInfo, Request, Script, ScriptedEngine, Token, TokenEvent
from harmonium.errors import ConfigError, EngineBusy, EngineClosed, PromptTooLong, RequestError
from harmonium.model.batch import SamplingParams


async def collect(engine: Engine, request: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(request)]


def play(engine: Engine, request: Request) -> tuple[list[int], str | None]:
    events = asyncio.run(collect(engine, request))
    assert all(event.finish_reason is None for event in events[:-1])
    return [token.token_id for event in events for token in event.tokens], events[-1].finish_reason


REQUEST = Request("r", (1, 2), stop_token_ids=frozenset({9}))


def test_scripts_are_played_in_turn() -> None:
    engine = ScriptedEngine([[3, 4, 9], [5, 9]])
    assert [play(engine, REQUEST) for _ in range(3)] == [
        ([3, 4, 9], "stop"),
        ([5, 9], "stop"),
        ([3, 4, 9], "stop"),
    ]
    assert engine.requests == [REQUEST] * 3
    assert engine.finished == ["stop"] * 3 and engine.running == 0


def test_answer_ends_where_a_real_engine_would() -> None:
    engine = ScriptedEngine(lambda request: [3, 9, 4], info=EngineInfo("m", 4, 100, "scripted"))
    assert play(engine, REQUEST) == ([3, 9], "stop")
    assert play(engine, Request("r", (1,), stop_token_ids=frozenset())) == ([3, 9, 4], "length")
    assert play(engine, Request("r", (1, 2))) == ([3, 9], "length")  # the context is full
    assert play(engine, Request("r", (1,), SamplingParams(max_tokens=1), frozenset({9}))) == ([3], "length")
    ignoring = SamplingParams(ignore_stop=True)
    assert play(engine, Request("r", (1,), ignoring, frozenset({9}))) == ([3, 9, 4], "length")


def test_error_script_ends_with_error_after_its_tokens() -> None:
    engine = ScriptedEngine([Script((3,), error="broken")])
    events = asyncio.run(collect(engine, REQUEST))
    assert events == [TokenEvent((Token(3),)), TokenEvent((), "error", error="broken")]


def test_tokens_come_in_events_of_the_size_asked_for() -> None:
    events = asyncio.run(collect(ScriptedEngine([[3, 4, 5, 9]], tokens_per_event=3), REQUEST))
    assert [len(event.tokens) for event in events] == [3, 1]


def test_logprobs_come_only_when_asked_for() -> None:
    rich = Token(3, -0.5, ((3, -0.5), (4, -1.0)))
    engine = ScriptedEngine([[rich, 9]])
    plain, one = (
        asyncio.run(collect(engine, Request("r", (1,), SamplingParams(logprobs=n), frozenset({9}))))
        for n in (None, 1)
    )
    assert plain[0].tokens == (Token(3),)
    assert one[0].tokens == (Token(3, -0.5, ((3, -0.5),)),)
    assert one[1].tokens == (Token(9, 0.0, ((9, 0.0),)),)


def test_bad_requests_are_refused_as_by_a_real_engine() -> None:
    engine = ScriptedEngine([[9]], info=EngineInfo("m", 4, 100, "scripted"))
    for prompt, error in (((), RequestError), ((1,) * 4, PromptTooLong), ((100,), RequestError)):
        with pytest.raises(error):
            engine.admit(Request("r", prompt))
        with pytest.raises(error):
            play(engine, Request("r", prompt))
    assert engine.requests == []


def test_one_request_too_many_meets_engine_busy() -> None:
    engine = ScriptedEngine([[3, 9]], max_running=1)

    async def run() -> None:
        events = engine.generate(REQUEST)
        await anext(events)
        assert engine.running == 1
        with pytest.raises(EngineBusy, match="1 requests run; the limit is 1"):
            engine.admit(REQUEST)
        await events.aclose()
        engine.admit(REQUEST)

    asyncio.run(run())
    assert engine.finished == ["aborted"] and engine.running == 0


def test_close_ends_what_is_played_with_aborted() -> None:
    engine = ScriptedEngine([[3] * 1000], seconds_per_event=0.001)

    async def run() -> None:
        task = asyncio.create_task(collect(engine, REQUEST))
        await asyncio.sleep(0.01)
        await engine.close()
        await engine.close()
        assert (await task)[-1].finish_reason == "aborted"
        with pytest.raises(EngineClosed):
            engine.admit(REQUEST)

    asyncio.run(run())
    assert engine.finished == ["aborted"]


def test_engine_without_scripts_is_refused() -> None:
    with pytest.raises(ConfigError, match="scripts is empty"):
        ScriptedEngine([])
    with pytest.raises(ConfigError, match="tokens_per_event is 0"):
        ScriptedEngine([[1]], tokens_per_event=0)
