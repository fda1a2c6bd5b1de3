"""A vLLM that runs: HARMONIUM_TEST_VLLM=http://host:8000 names it. docs/vllm.md says how one is started."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import httpx
import pytest

from harmonium.engine import Request, Token, TokenEvent
from harmonium.engine.connect import Wanted, connect, parse_upstreams
from harmonium.engine.remote import RemoteEngine
from harmonium.engine.upstream import RemoteSettings
from harmonium.harmony.grammar import TurnRules, compile_turn
from harmonium.harmony.messages import Tool
from harmonium.harmony.vocabulary import START, vocabulary
from harmonium.model.batch import SamplingParams

URL = os.environ.get("HARMONIUM_TEST_VLLM", "")
pytestmark = pytest.mark.skipif(not URL, reason="HARMONIUM_TEST_VLLM names no running vLLM")

T = TypeVar("T")
PROMPT = tuple(range(100, 300))


def run(work: Callable[[RemoteEngine], Awaitable[T]]) -> T:
    async def all_of_it() -> T:
        settings = RemoteSettings(start_seconds=10.0)
        engine = await connect(parse_upstreams([URL], settings), Wanted(), settings)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(all_of_it())


def ask(stop: frozenset[int] = frozenset(), **sampling: float) -> list[TokenEvent]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 6, **sampling})  # type: ignore[arg-type]

    async def collect(engine: RemoteEngine) -> list[TokenEvent]:
        return [event async for event in engine.generate(Request("real", PROMPT, params, stop))]

    return run(collect)


def tokens(events: list[TokenEvent]) -> list[Token]:
    return [token for event in events for token in event.tokens]


def test_answer_repeats_stops_behind_its_stop_token_and_finds_its_prefix_cached() -> None:
    first, second = ask(), ask()
    ids = [token.token_id for token in tokens(first)]
    assert ids == [token.token_id for token in tokens(second)] and len(ids) == 6
    assert first[-1].finish_reason == "length" and second[-1].num_cached_tokens >= 128
    stop = ids[3]
    stopped = ask(frozenset({stop}))
    assert [token.token_id for token in tokens(stopped)] == ids[: ids.index(stop) + 1]
    assert stopped[-1].finish_reason == "stop"


def test_logprobs_are_of_the_tokens_and_the_best_first() -> None:
    for token in tokens(ask(logprobs=4)):
        found = [logprob for _, logprob in token.top_logprobs]
        assert len(found) == 4 and found == sorted(found, reverse=True)
        assert token.logprob == pytest.approx(found[0])


def test_every_sampling_parameter_is_taken() -> None:
    given = {
        "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": (1 << 64) - 1,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "max_tokens": 4,
    }  # fmt: skip
    assert len(tokens(ask(**given))) == 4


def test_prompt_is_scored() -> None:
    scores = run(lambda engine: engine.score(PROMPT[:9], 2))
    assert [token.token_id for token in scores] == list(PROMPT[:9]) and scores[0].logprob is None
    assert all(token.logprob is not None and len(token.top_logprobs) == 2 for token in scores[1:])


def test_grammar_is_kept_even_by_random_weights() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    turn = compile_turn(
        TurnRules(tool_choice="required", max_reasoning_tokens=5), [Tool("weather", "", schema)]
    )
    prompt = (START, *vocabulary().encode("assistant"))
    request = Request(
        "tool", prompt, SamplingParams(max_tokens=400, seed=1), turn.stop_token_ids, constraint=turn
    )

    async def collect(engine: RemoteEngine) -> list[TokenEvent]:
        return [event async for event in engine.generate(request)]

    events = run(collect)
    text = vocabulary().decode([token.token_id for token in tokens(events)])
    state = turn.start()
    for token in tokens(events):
        state.advance(token.token_id)
    assert state.is_complete and events[-1].finish_reason == "stop"
    assert "to=functions.weather" in text and text.endswith("<|call|>")


def test_leaving_frees_the_request() -> None:
    async def leave(engine: RemoteEngine) -> None:
        request = Request("leave", PROMPT, SamplingParams(max_tokens=700))
        async with aclosing(engine.generate(request)) as events:
            await anext(events)
        async with httpx.AsyncClient() as client:
            for _ in range(100):
                lines = (await client.get(f"{URL}/metrics")).text.splitlines()
                running = [line for line in lines if line.startswith("vllm:num_requests_running")]
                if running and all(line.endswith(" 0.0") for line in running):
                    return
                await asyncio.sleep(0.1)
        raise AssertionError(running)

    run(leave)
