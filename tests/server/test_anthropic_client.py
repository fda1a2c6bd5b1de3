"""Anthropic's own client against our Messages API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pydantic
import pytest

from harmonium.server import ServerState
from tests.scripted_chat import REASONED
from tests.server.client import HELLO, engine_of, make_state, prompt_text
from tests.server.live import served, wait_until
from tests.server.messages_client import WEATHER

CALL = (
    "<|channel|>analysis<|message|>need weather<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city":"Oslo"}<|call|>'
)
ANSWER = "<|channel|>final<|message|>It is 22 degrees in Oslo.<|return|>"
KEY = "sk-test-key"
MODEL = "scripted"
ADAPTIVE: Any = {"type": "adaptive"}


class Place(pydantic.BaseModel):
    city: str
    degrees: int


@pytest.fixture
def state() -> ServerState:
    return make_state(REASONED, api_keys=(KEY,))


@pytest.fixture
def client(state: ServerState) -> Iterator[anthropic.Anthropic]:
    with served(state) as url, anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@asynccontextmanager
async def async_client(url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def dump(message: Any) -> dict[str, Any]:
    """A message without its id, and without what differs by design: None where a field was not sent."""
    data = message.model_dump(exclude_none=True)
    for block in data["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    data.pop("id")
    assert isinstance(data, dict)
    return data


def test_sync_answer_and_both_kinds_of_stream_say_the_same(client: anthropic.Anthropic) -> None:
    request: Any = {"model": MODEL, "max_tokens": 100, "messages": HELLO, "thinking": ADAPTIVE}
    whole = client.messages.create(**request)
    thinking, text = whole.content
    assert thinking.type == "thinking" and thinking.thinking == "think hard" and thinking.signature
    assert text.type == "text" and text.text == "Hi there"
    assert whole.stop_reason == "end_turn" and whole.usage.output_tokens == 14
    assert whole._request_id is not None and whole._request_id.startswith("req_")
    with client.messages.stream(**request) as stream:
        kinds = [event.type for event in stream]
        assert dump(stream.get_final_message()) == dump(whole)
        assert stream.get_final_text() == "Hi there"
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert {"thinking", "signature", "text", "content_block_stop", "message_delta"} <= set(kinds)
    raw = [event.type for event in client.messages.create(**request, stream=True)]
    assert [raw[0], *raw[-2:]] == ["message_start", "message_delta", "message_stop"]


def test_tokens_are_counted_as_usage_says(client: anthropic.Anthropic) -> None:
    prompt: Any = {"model": MODEL, "messages": HELLO, "system": "Be brief", "tools": [WEATHER]}
    count = client.messages.count_tokens(**prompt)
    usage = client.messages.create(max_tokens=50, **prompt).usage
    assert count.input_tokens == usage.input_tokens > 0


def test_failures_raise_the_client_s_own_errors(client: anthropic.Anthropic) -> None:
    request: Any = {"model": MODEL, "max_tokens": 100, "messages": HELLO}
    with pytest.raises(anthropic.AuthenticationError, match="API key is missing or wrong"):
        client.with_options(api_key="sk-wrong").messages.create(**request)
    with pytest.raises(anthropic.NotFoundError, match="model 'claude-x' is not served here"):
        client.messages.create(**{**request, "model": "claude-x"})
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    with pytest.raises(anthropic.BadRequestError, match='"image"') as failure:
        client.messages.create(**{**request, "messages": [{"role": "user", "content": [image]}]})
    body: Any = failure.value.body
    assert body["error"]["type"] == "invalid_request_error"
    assert failure.value.request_id == body["request_id"]


def test_models_are_listed(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_bearer_token_is_accepted_too(state: ServerState) -> None:
    with served(state) as url, anthropic.Anthropic(base_url=url, auth_token=KEY, api_key=None) as client:
        message = client.messages.create(model=MODEL, max_tokens=50, messages=HELLO)  # type: ignore[arg-type]
    assert message.content[0].type == "text"


def test_failure_in_a_stream_is_raised() -> None:
    from harmonium.engine import Script, ScriptedEngine
    from harmonium.server import ServerConfig
    from tests.scripted_chat import gen

    script = Script(gen("<|channel|>final<|message|>half"), error="the step failed")
    state = ServerState(ServerConfig(), ScriptedEngine([script]))
    with served(state) as url, anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        seen = []
        with (
            pytest.raises(anthropic.APIStatusError, match="the step failed"),
            client.messages.stream(model=MODEL, max_tokens=50, messages=HELLO) as stream,  # type: ignore[arg-type]
        ):
            seen += list(stream.text_stream)
    assert "half" in "".join(seen) or not seen
    assert state.num_held == 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_async_tool_loop_ends_in_an_answer(is_streamed: bool) -> None:
    state = make_state(CALL, ANSWER, api_keys=(KEY,))

    async def ask(client: anthropic.AsyncAnthropic, messages: list[Any]) -> Any:
        request: Any = {"model": MODEL, "max_tokens": 200, "messages": messages, "tools": [WEATHER]}
        if not is_streamed:
            return await client.messages.create(**request)
        async with client.messages.stream(**request) as stream:
            return await stream.get_final_message()

    async def run(url: str) -> Any:
        async with async_client(url) as client:
            messages: list[Any] = [{"role": "user", "content": "Weather in Oslo?"}]
            first = await ask(client, messages)
            assert first.stop_reason == "tool_use"
            assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
            call = first.content[-1]
            assert (call.name, call.input) == ("get_weather", {"city": "Oslo"})
            messages.append({"role": "assistant", "content": first.content})
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "22 degrees"}
            messages.append({"role": "user", "content": [result]})
            return await ask(client, messages)

    with served(state) as url:
        second = asyncio.run(run(url))
    assert [block.text for block in second.content] == ["It is 22 degrees in Oslo."]
    # The turn stands in the history token for token.
    assert f"<|start|>assistant{CALL}<|start|>functions.get_weather to=assistant" in prompt_text(state)


def test_tool_runner_runs_the_loop_by_itself() -> None:
    state = make_state(CALL, ANSWER, api_keys=(KEY,))
    asked: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Weather of a city.

        Args:
            city: its name
        """
        asked.append(city)
        return "22 degrees"

    with served(state) as url, anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        messages: Any = HELLO
        runner = client.beta.messages.tool_runner(
            model=MODEL, max_tokens=200, messages=messages, tools=[get_weather]
        )
        final = runner.until_done()
    assert asked == ["Oslo"]
    assert final.content[0].type == "text" and final.content[0].text == "It is 22 degrees in Oslo."


def test_parse_gives_a_pydantic_object() -> None:
    value = {"city": "Oslo", "degrees": 22}
    state = make_state(f"<|channel|>final <|constrain|>json<|message|>{json.dumps(value)}<|return|>")
    with served(state) as url, anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        messages: Any = HELLO
        answer = client.messages.parse(model=MODEL, max_tokens=100, messages=messages, output_format=Place)
    assert answer.parsed_output == Place(**value)
    assert "# Response Formats" in prompt_text(state)


def test_a_client_that_leaves_frees_its_slot() -> None:
    state = make_state("<|channel|>final<|message|>" + "word " * 100_000)
    with served(state) as url, anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        request: Any = {"model": MODEL, "max_tokens": 100_000, "messages": HELLO}
        with client.messages.stream(**request) as stream:
            assert next(iter(stream.text_stream))
        wait_until(lambda: state.num_held == 0)
    assert len(engine_of(state).requests) == 1
