"""OpenAI's Python client over a real socket, sync and async: what tests/server/test_openai_client.py and
test_responses_client.py do not cover. Every streamed event must be one of the client's own strict types."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from harmonium.server import ServerState
from tests.clients.scripts import ANSWER, KEY, REASONED, WEATHER, WEATHER_PARAMETERS, final, keyed_state
from tests.server.client import engine_of, prompt_text
from tests.server.live import served

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CHAT_TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER_PARAMETERS}}
]
RESPONSE_TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "parameters": WEATHER_PARAMETERS, "strict": True}
]
QUESTION: list[Any] = [{"role": "user", "content": "Weather in Oslo?"}]


class Party(pydantic.BaseModel):
    name: str
    guests: list[str]


PARTY = Party(name="Midsummer", guests=["Ada", "Bo"])
PARTY_TEXT = final(PARTY.model_dump_json(), constrained=True)


def weather(arguments: str) -> str:
    """The tool."""
    assert json.loads(arguments) == {"city": "Oslo"}
    return "22 degrees"


def sync_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def async_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def chat_loop(client: openai.OpenAI) -> str | None:
    messages = list(QUESTION)
    while True:
        answer = client.chat.completions.create(model="scripted", messages=messages, tools=CHAT_TOOLS)
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for tool_call in message.tool_calls:
            assert tool_call.type == "function"
            content = weather(tool_call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": tool_call.id, "content": content})


def responses_loop(client: openai.OpenAI) -> str:
    items = list(QUESTION)
    while True:
        answer = client.responses.create(
            model="scripted",
            input=items,
            tools=RESPONSE_TOOLS,
            store=False,
            include=["reasoning.encrypted_content"],
        )
        items += answer.output
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            return answer.output_text
        for item in calls:
            result = {
                "type": "function_call_output",
                "call_id": item.call_id,
                "output": weather(item.arguments),
            }
            items.append(result)


def check_loop(state: ServerState, text: str | None) -> None:
    assert text == "It is 22 degrees in Oslo."
    seen = prompt_text(state)
    assert seen.index("I need the tool.") < seen.index('{"city": "Oslo"}') < seen.index("22 degrees")
    assert len(engine_of(state).requests) == 2


@pytest.mark.parametrize("loop", [chat_loop, responses_loop])
def test_sync_tool_loop_replays_thought_call_and_result(loop: Any) -> None:
    state = keyed_state(WEATHER, ANSWER)
    with served(state) as url, sync_client(url) as client:
        check_loop(state, loop(client))


def test_async_responses_tool_loop_by_previous_response_id() -> None:
    state = keyed_state(WEATHER, ANSWER)

    async def run(url: str) -> str:
        async with async_client(url) as client:
            first = await client.responses.create(model="scripted", input=QUESTION, tools=RESPONSE_TOOLS)
            (item,) = [item for item in first.output if item.type == "function_call"]
            second = await client.responses.create(
                model="scripted",
                previous_response_id=first.id,
                tools=RESPONSE_TOOLS,
                input=[
                    {
                        "type": "function_call_output",
                        "call_id": item.call_id,
                        "output": weather(item.arguments),
                    }
                ],
            )
            return second.output_text

    with served(state) as url:
        check_loop(state, asyncio.run(run(url)))


def test_sync_parse_on_both_apis() -> None:
    with served(keyed_state(PARTY_TEXT)) as url, sync_client(url) as client:
        chat = client.chat.completions.parse(model="scripted", messages=QUESTION, response_format=Party)
        response = client.responses.parse(model="scripted", input=QUESTION, text_format=Party)
        with client.responses.stream(model="scripted", input=QUESTION, text_format=Party) as stream:
            list(stream)
            streamed = stream.get_final_response()
    assert chat.choices[0].message.parsed == PARTY
    assert response.output_parsed == PARTY == streamed.output_parsed


def test_async_parse_on_both_apis() -> None:
    async def run(url: str) -> tuple[Any, Any]:
        async with async_client(url) as client:
            chat = await client.chat.completions.parse(
                model="scripted", messages=QUESTION, response_format=Party
            )
            response = await client.responses.parse(model="scripted", input=QUESTION, text_format=Party)
            return chat.choices[0].message.parsed, response.output_parsed

    with served(keyed_state(PARTY_TEXT)) as url:
        assert asyncio.run(run(url)) == (PARTY, PARTY)


def test_parsed_tools_are_pydantic_objects() -> None:
    class GetWeather(pydantic.BaseModel):
        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    with served(keyed_state(WEATHER)) as url, sync_client(url) as client:
        answer = client.chat.completions.parse(model="scripted", messages=QUESTION, tools=[tool])
    (found,) = answer.choices[0].message.tool_calls or []
    assert found.function.parsed_arguments == GetWeather(city="Oslo")


@pytest.mark.parametrize("script", [REASONED, WEATHER, PARTY_TEXT])
def test_every_streamed_event_is_of_the_client_s_strict_types(script: str) -> None:
    state = keyed_state(script)

    async def run(url: str) -> tuple[Any, Any]:
        async with async_client(url) as client:
            stream = await client.responses.create(
                model="scripted", input=QUESTION, tools=RESPONSE_TOOLS, stream=True
            )
            kinds = []
            async for event in stream:
                EVENT.validate_python(event.model_dump())
                kinds.append(event.type)
            chunks = await client.chat.completions.create(
                model="scripted",
                messages=QUESTION,
                tools=CHAT_TOOLS,
                stream=True,
                stream_options={"include_usage": True},
            )
            last = None
            async for last in chunks:
                ChatCompletionChunk.model_validate(last.model_dump(), strict=True)
            return kinds, last

    with served(state) as url:
        kinds, last = asyncio.run(run(url))
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") > 0
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_an_answer_that_breaks_off_raises_in_the_client() -> None:
    from harmonium.engine import Script, ScriptedEngine
    from harmonium.server import ServerConfig
    from tests.scripted_chat import gen

    broken = Script(gen("<|channel|>final<|message|>It is"), error="the engine broke")
    state = ServerState(ServerConfig(api_keys=(KEY,)), ScriptedEngine([broken]))
    with served(state) as url, sync_client(url) as client:
        with pytest.raises(openai.APIError, match="the engine broke"):
            list(client.chat.completions.create(model="scripted", messages=QUESTION, stream=True))
        with pytest.raises(openai.InternalServerError, match="the engine broke"):
            client.responses.create(model="scripted", input=QUESTION)
        events = list(client.responses.create(model="scripted", input=QUESTION, stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None and "the engine broke" in events[-1].response.error.message
