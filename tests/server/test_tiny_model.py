"""The API over a real engine: a tiny checkpoint with random weights, whose gibberish is legal Harmony."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine
from harmonium.server import ServerConfig, ServerState, create_app
from harmonium.testing import make_tiny_checkpoint
from tests.engine.serving import check_empty
from tests.server.chat_stream import fold
from tests.server.client import BASE_URL, HELLO, chunks_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("server") / "tiny")


@asynccontextmanager
async def serving(model: Path) -> AsyncGenerator[tuple[httpx.AsyncClient, LocalEngine], None]:
    """A client of a server over the model; afterwards nothing may be left in the engine."""
    from harmonium.engine.create import create_engine

    config = EngineConfig(context_length=1024, max_sequences=4, threads=1)
    engine = await asyncio.to_thread(create_engine, model, config)
    state = ServerState(ServerConfig(max_concurrency=4), engine)
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=60) as client:
        try:
            yield client, engine
            assert state.num_held == 0
        finally:
            await engine.close()
    check_empty(engine)


def test_real_engine_serves_chat_completions_and_scores(model: Path) -> None:
    async def run() -> None:
        async with serving(model) as (client, _):
            await _check_same_streamed_and_whole(client)
            await _check_cached_tokens(client)
            await _check_tool_choice(client)
            await _check_scores(client)

    asyncio.run(run())


async def _post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


async def _check_same_streamed_and_whole(client: httpx.AsyncClient) -> None:
    body = {"messages": HELLO, "seed": 5, "max_tokens": 60, "logprobs": True, "top_logprobs": 2}
    whole = (await _post(client, "/v1/chat/completions", **body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = await _post(client, "/v1/chat/completions", **body, **options)
    choice, usage = fold(chunks_of(streamed))
    assert choice["message"] == whole["choices"][0]["message"]
    assert choice["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage is not None
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]


async def _check_cached_tokens(client: httpx.AsyncClient) -> None:
    """FAULTS B65: the second identical request finds its prefix in the cache."""
    body = {"messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 4}
    for is_second in (False, True):
        usage = (await _post(client, "/v1/chat/completions", **body)).json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert (cached >= 160) == is_second


async def _check_tool_choice(client: httpx.AsyncClient) -> None:
    """Random weights may write a long preamble; a turn that ends must end in the call."""
    body = {"messages": HELLO, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 300}
    ends = []
    for seed in range(6):
        answer = await _post(client, "/v1/chat/completions", **body, seed=seed, reasoning={"max_tokens": 20})
        choice = answer.json()["choices"][0]
        ends.append(choice["finish_reason"])
        if ends[-1] == "tool_calls":
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["name"] == "get_weather"
            assert json.loads(call["function"]["arguments"]) in ({"unit": "C"}, {"unit": "F"})
    assert set(ends) <= {"tool_calls", "length"}
    assert ends.count("tool_calls") >= 2, ends


async def _check_scores(client: httpx.AsyncClient) -> None:
    """A greedy answer, scored as a prompt, has the log-probabilities that it was written with."""
    prompt = [1, 2, 3, 4, 5]
    fields: dict[str, Any] = {"temperature": 0, "logprobs": 1, "return_token_ids": True, "ignore_eos": True}
    written = (await _post(client, "/v1/completions", prompt=prompt, max_tokens=8, **fields)).json()[
        "choices"
    ][0]
    answer = written["token_ids"]
    scored = (
        await _post(client, "/v1/completions", prompt=prompt + answer, echo=True, max_tokens=0, **fields)
    ).json()["choices"][0]
    assert scored["logprobs"]["token_logprobs"][5:] == pytest.approx(
        written["logprobs"]["token_logprobs"], abs=2e-2
    )
