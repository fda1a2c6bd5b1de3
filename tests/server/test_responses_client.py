"""OpenAI's own client against /v1/responses, on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from harmonium.server import ServerState
from tests.scripted_chat import FINAL, REASONED
from tests.server.client import make_state
from tests.server.live import served, wait_until
from tests.server.responses_client import function

KEY = "sk-test-key"
CALL = (
    "<|channel|>analysis<|message|>need weather<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.get_weather <|constrain|>json<|message|>{"city":"Oslo"}<|call|>'
)
TOOLS: Any = [function("get_weather", city={"type": "string"})]


class Event(pydantic.BaseModel):
    name: str
    participants: list[str]


@pytest.fixture
def served_client(request: pytest.FixtureRequest) -> Iterator[tuple[ServerState, openai.OpenAI]]:
    scripts: tuple[str, ...] = getattr(request, "param", (REASONED,))
    state = make_state(*scripts, api_keys=(KEY,))
    with served(state) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield state, client


Served = tuple[ServerState, openai.OpenAI]


def test_sync_answer_and_stream_say_the_same(served_client: Served) -> None:
    _, client = served_client
    whole = client.responses.create(model="scripted", input="Hello")
    assert (whole.output_text, whole.status) == ("Hi there", "completed")
    with client.responses.stream(model="scripted", input="Hello") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "Hi there"
    assert kinds[-1] == "response.completed"
    assert "response.reasoning_text.delta" in kinds


def test_async_client_streams() -> None:
    state = make_state(REASONED)

    async def work(url: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.responses.create(model="scripted", input="Hello", stream=True)
            return "".join(
                [event.delta async for event in stream if event.type == "response.output_text.delta"]
            )

    with served(state) as url:
        assert asyncio.run(work(url)) == "Hi there"


@pytest.mark.parametrize(
    "served_client", [(FINAL.format('{"name":"Fair","participants":["Ann","Bo"]}'),)], indirect=True
)
def test_parse_gives_a_model(served_client: Served) -> None:
    _, client = served_client
    parsed = client.responses.parse(model="scripted", input="Who goes?", text_format=Event)
    assert parsed.output_parsed == Event(name="Fair", participants=["Ann", "Bo"])
    with client.responses.stream(model="scripted", input="Who goes?", text_format=Event) as stream:
        assert stream.until_done().get_final_response().output_parsed == parsed.output_parsed


@pytest.mark.parametrize("served_client", [(CALL, FINAL.format("22 degrees."))], indirect=True)
@pytest.mark.parametrize("is_stored", [True, False])
def test_tool_loop_by_id_and_by_replay(served_client: Served, is_stored: bool) -> None:
    _, client = served_client
    first = client.responses.create(
        model="scripted",
        input="Weather?",
        tools=TOOLS,
        store=is_stored,
        include=["reasoning.encrypted_content"],
    )
    call = next(item for item in first.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Oslo"}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "22"}
    if is_stored:
        fields: Any = {"previous_response_id": first.id, "input": [result]}
    else:
        fields = {"input": [{"role": "user", "content": "Weather?"}, *first.output, result]}
    second = client.responses.create(model="scripted", tools=TOOLS, **fields)
    assert second.output_text == "22 degrees."


@pytest.mark.parametrize("served_client", [(FINAL.format("word " * 3000),)], indirect=True)
def test_background_response_is_followed_and_cancelled(served_client: Served) -> None:
    state, client = served_client
    made = client.responses.create(model="scripted", input="Go", background=True, stream=True)
    seen = []
    for event in made:
        seen.append(event)
        if len(seen) == 10:
            break
    made.close()
    assert seen[0].type == "response.created"
    response_id = seen[0].response.id
    rest = client.responses.retrieve(response_id, stream=True, starting_after=9)
    assert next(iter(rest)).sequence_number == 10
    rest.close()
    cancelled = client.responses.cancel(response_id)
    assert cancelled.status in ("cancelled", "completed")
    wait_until(lambda: state.num_running == 0)
    assert client.responses.retrieve(response_id).status == cancelled.status
    client.responses.delete(response_id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response_id)


def test_input_items_are_paged(served_client: Served) -> None:
    _, client = served_client
    items: Any = [{"role": "user", "content": f"m{n}"} for n in range(7)]
    made = client.responses.create(model="scripted", input=items)
    pages = client.responses.input_items.list(made.id, limit=3, order="asc")
    assert [item.content[0].text for item in pages] == [f"m{n}" for n in range(7)]  # type: ignore[union-attr]


def test_input_tokens_are_counted(served_client: Served) -> None:
    _, client = served_client
    counted = client.responses.input_tokens.count(model="scripted", input="Hello")
    made = client.responses.create(model="scripted", input="Hello")
    assert made.usage is not None
    assert counted.input_tokens == made.usage.input_tokens


def test_errors_are_the_clients_own(served_client: Served) -> None:
    _, client = served_client
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="scripted", input="x", reasoning={"effort": "huge"})  # type: ignore[typeddict-item]
    assert bad.value.param == "reasoning.effort"
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="scripted", input="x", previous_response_id="resp_none")
    assert missing.value.code == "previous_response_not_found"


def test_client_that_leaves_a_stream_frees_the_slot() -> None:
    state = make_state(FINAL.format("word " * 20_000))
    with served(state) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        for _ in range(5):
            stream = client.responses.create(model="scripted", input="Go", stream=True)
            next(iter(stream))
            stream.close()
        wait_until(lambda: state.num_running == 0)
