"""OpenAI's own client against our Chat Completions and Completions APIs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from harmonium.server import ServerState, create_app
from tests.scripted_chat import REASONED
from tests.server.client import BASE_URL, HELLO, engine_of, make_state, prompt_text
from tests.server.live import served

CALL = (
    "<|channel|>analysis<|message|>need weather<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.get_weather <|constrain|>json<|message|>{"city":"Oslo"}<|call|>'
)
ANSWER = "<|channel|>final<|message|>It is 22 degrees in Oslo.<|return|>"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
KEY = "sk-test-key"


class Event(pydantic.BaseModel):
    name: str
    participants: list[str]


@pytest.fixture
def state() -> ServerState:
    return make_state(REASONED, api_keys=(KEY,))


def async_client(state: ServerState) -> openai.AsyncOpenAI:
    transport = httpx.ASGITransport(create_app(state))
    http = httpx.AsyncClient(transport=transport, base_url=BASE_URL)
    return openai.AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=KEY, http_client=http, max_retries=0)


@pytest.fixture
def client(state: ServerState) -> Iterator[openai.OpenAI]:
    with served(state) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_sync_answer_and_stream_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="scripted", messages=HELLO)  # type: ignore[arg-type]
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hi there", "think hard")  # type: ignore[attr-defined]
    with client.chat.completions.stream(model="scripted", messages=HELLO) as stream:  # type: ignore[arg-type]
        types = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in types and types[-1] == "content.done"
    assert final.choices[0].message.content == "Hi there"
    assert final.choices[0].finish_reason == "stop"
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").id == "scripted"


def test_sync_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="scripted", prompt=[1, 2, 3], logprobs=1)
    parts = list(client.completions.create(model="scripted", prompt=[1, 2, 3], stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.choices[0].logprobs is not None
    assert whole.usage is not None and whole.usage.prompt_tokens == 3


def test_wrong_key_and_wrong_model_raise_the_client_s_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' is not served here"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as failure:
        client.chat.completions.create(model="scripted", messages=HELLO, temperature=1e6)  # type: ignore[arg-type]
    assert (failure.value.param, failure.value.type) == ("temperature", "invalid_request_error")


def test_async_tool_loop_ends_in_an_answer() -> None:
    state = make_state(CALL, ANSWER)

    async def run() -> str | None:
        async with async_client(state) as client:
            messages: list[Any] = [{"role": "user", "content": "Weather in Oslo?"}]
            first = await client.chat.completions.create(model="scripted", messages=messages, tools=TOOLS)
            assert first.choices[0].finish_reason == "tool_calls"
            (call,) = first.choices[0].message.tool_calls or []
            assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Oslo"}
            messages += [
                first.choices[0].message,
                {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"},
            ]
            second = await client.chat.completions.create(model="scripted", messages=messages, tools=TOOLS)
            return second.choices[0].message.content

    assert asyncio.run(run()) == "It is 22 degrees in Oslo."
    text = prompt_text(state)
    assert text.index("need weather") < text.index('{"city":"Oslo"}') < text.index("22 degrees")


def test_async_stream_assembles_tool_calls_and_usage() -> None:
    async def run() -> Any:
        async with async_client(make_state(CALL)) as client:
            options: Any = {"include_usage": True}
            async with client.chat.completions.stream(
                model="scripted",
                messages=HELLO,
                tools=TOOLS,
                stream_options=options,  # type: ignore[arg-type]
            ) as stream:
                async for _ in stream:
                    pass
                return await stream.get_final_completion()

    final = asyncio.run(run())
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    assert final.usage.completion_tokens > 0


def test_parse_gives_a_pydantic_object() -> None:
    value = {"name": "Party", "participants": ["Ada", "Bo"]}
    state = make_state(f"<|channel|>final <|constrain|>json<|message|>{json.dumps(value)}<|return|>")

    async def run() -> Event | None:
        async with async_client(state) as client:
            answer = await client.chat.completions.parse(
                model="scripted",
                messages=HELLO,
                response_format=Event,  # type: ignore[arg-type]
            )
            return answer.choices[0].message.parsed

    assert asyncio.run(run()) == Event(**value)
    assert "# Response Formats\n\n## Event" in prompt_text(state)


def test_options_of_the_client_reach_the_engine() -> None:
    state = make_state(REASONED)

    async def run() -> Any:
        async with async_client(state) as client:
            return await client.chat.completions.create(
                model="scripted",
                messages=HELLO,  # type: ignore[arg-type]
                temperature=0.5,
                top_p=0.9,
                seed=7,
                n=2,
                stop=["zzz"],
                presence_penalty=0.1,
                frequency_penalty=0.2,
                logit_bias={"5": -100},
                logprobs=True,
                top_logprobs=2,
                max_completion_tokens=50,
                reasoning_effort="high",
                metadata={"a": "b"},
                user="u",
                extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1},
            )

    answer = asyncio.run(run())
    first, second = (request.sampling for request in engine_of(state).requests)
    assert (first.temperature, first.top_p, first.seed, second.seed) == (0.5, 0.9, 7, 8)
    assert (first.presence_penalty, first.frequency_penalty, first.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (first.logit_bias, first.logprobs, first.max_tokens) == ({5: -100}, 2, 50)
    assert (first.top_k, first.min_p) == (3, 0.1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [token.token for token in answer.choices[0].logprobs.content] == ["Hi", " there"]
    assert bytes(answer.choices[0].logprobs.content[1].bytes) == b" there"
