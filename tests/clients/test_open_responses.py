"""The cases of the Open Responses compliance suite, and our objects and events against its models.

The suite itself needs bun and is not packaged; these are its cases by name, with requests of our own,
validated by the specification's models (openresponses-types). Images and files are refused, for the models
read text only; file search and web search run at OpenAI, so such a tool is left out with a warning:
docs/clients.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from harmonium.engine import Script, ScriptedEngine
from harmonium.server import ServerConfig, ServerState
from tests.clients.scripts import ANSWER, REASONED, WEATHER, WEATHER_PARAMETERS
from tests.scripted_chat import gen
from tests.server.client import call, engine_of, error_of, make_state, prompt_text, with_client
from tests.server.responses_client import PATH, Json, events_of, function, respond

spec: Any = pytest.importorskip(
    "openresponses_types.types", reason="openresponses-types is not installed: tests/clients/install"
)

TEXT = (
    "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look."
    "<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
)
CUT = "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>Hi"
HEADERS = {"x-harmonium-events": "open-responses"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="
TOOL: Json = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": WEATHER_PARAMETERS,
}
CALL_ITEM: Json = {
    "type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city":"Oslo"}',
}  # fmt: skip
RESULT_ITEM: Json = {"type": "function_call_output", "call_id": "call_1", "output": "22 degrees"}


def said(role: str, content: Any) -> Json:
    """A message item."""
    return {"type": "message", "role": role, "content": content}


def event_models() -> dict[str, Any]:
    """Type of an event -> its model."""
    found = {}
    for name in dir(spec):
        if name.endswith("StreamingEvent"):
            kind = getattr(spec, name).model_fields["type"].annotation
            found[next(iter(kind)).value] = getattr(spec, name)
    return found


def without_hosted_tools(event: Json) -> Json:
    """The event without the tools of its response that the specification's models do not know.

    A response echoes the request's tools, as OpenAI's does; the models of a response know functions only.
    """
    if "response" not in event:
        return event
    tools = [tool for tool in event["response"]["tools"] if tool["type"] == "function"]
    return {**event, "response": {**event["response"], "tools": tools}}


def check_resource(response: Json) -> None:
    spec.ResponseResource.model_validate(without_hosted_tools({"response": response})["response"])


def stream(state: ServerState, body: Json) -> list[Json]:
    """The events, each of which must be one of the specification's, in its order; then [DONE]."""
    models = event_models()
    answer = call(state, "POST", PATH, json={**body, "stream": True}, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    text = answer.text.removesuffix("data: [DONE]\n\n")
    assert text != answer.text
    events = events_of(text)
    for event in events:
        models[event["type"]].model_validate(without_hosted_tools(event))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


@dataclass(frozen=True)
class Case:
    """script: what the model writes, checked by the grammar. kinds: types of the output's items."""

    fields: Json
    script: str = REASONED
    kinds: tuple[str, ...] = ("reasoning", "message")
    seen: tuple[str, ...] = field(default=())
    is_warned: bool = False


CASES = {
    "basic-response": Case({"input": [said("user", "Say hello in three words.")]}),
    "streaming-response": Case({"input": [said("user", "Count to five.")]}),
    "system-prompt": Case(
        {"input": [said("system", "Talk like a sailor."), said("user", "Hello")]},
        seen=("# Instructions\n\nTalk like a sailor.",),
    ),
    "tool-calling": Case(
        {"input": [said("user", "Weather in Oslo?")], "tools": [TOOL]},
        WEATHER,
        ("reasoning", "function_call"),
        ("type get_weather = (_: {",),
    ),
    "function-call-roundtrip": Case(
        {"input": [said("user", "Weather?"), CALL_ITEM, RESULT_ITEM], "tools": [TOOL]},
        ANSWER,
        ("message",),
        ("to=functions.get_weather", "22 degrees"),
    ),
    "forced tool_choice": Case(
        {
            "input": [said("user", "Hello")],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": "get_weather"},
        },
        WEATHER,
        ("reasoning", "function_call"),
    ),
    "multi-turn": Case(
        {"input": [said("user", "I am Ada."), said("assistant", "Hello Ada."), said("user", "Who am I?")]},
        seen=("<|channel|>final<|message|>Hello Ada.<|end|>",),
    ),
    "file-search": Case(
        {
            "input": [said("user", "Find it.")],
            "tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}],
        },
        is_warned=True,
    ),
    "offline-web-search": Case(
        {"input": [said("user", "Search.")], "tools": [{"type": "web_search", "external_web_access": False}]},
        is_warned=True,
    ),
}


def state_of(case: Case) -> ServerState:
    return ServerState(ServerConfig(), ScriptedEngine([Script(gen(case.script), obeys_constraint=True)]))


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_case_of_the_compliance_suite(name: str, is_streamed: bool) -> None:
    case = CASES[name]
    state = state_of(case)
    body = {"model": "scripted", **case.fields}
    if is_streamed:
        events = stream(state, body)
        response = events[-1]["response"]
        kinds = {event["type"].removeprefix("response.") for event in events}
        if "function_call" in case.kinds:
            assert {"function_call_arguments.delta", "function_call_arguments.done"} <= kinds
    else:
        answer = call(state, "POST", PATH, json={**body, "stream": False}, headers=HEADERS)
        response = answer.json()
    check_resource(response)
    assert response["status"] == "completed"
    assert tuple(item["type"] for item in response["output"]) == case.kinds
    assert bool(response["warnings"]) == case.is_warned
    assert all(text in prompt_text(state) for text in case.seen)


def test_previous_response_id_continues() -> None:
    state = make_state(REASONED, ANSWER)

    async def work(client: httpx.AsyncClient) -> tuple[Json, Json]:
        first = (await client.post(PATH, json={"input": "I am Ada."})).json()
        body = {"input": "Who am I?", "previous_response_id": first["id"]}
        return first, (await client.post(PATH, json=body)).json()

    first, second = with_client(state, work)
    spec.ResponseResource.model_validate(second)
    assert second["previous_response_id"] == first["id"]
    assert "I am Ada." in prompt_text(state) and "Hi there" in prompt_text(state)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": PIXEL},
        {"type": "input_image", "image_url": "http://127.0.0.1:9/x.png", "detail": "auto"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERg=="},
        {"type": "input_file", "file_url": "file:///etc/hostname"},
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_image_input_and_file_input_are_refused_by_name(part: Json, is_streamed: bool) -> None:
    state = make_state(REASONED)
    items = [said("user", [{"type": "input_text", "text": "What is this?"}, part])]
    error = error_of(call(state, "POST", PATH, json={"input": items, "stream": is_streamed}), 400)
    assert part["type"] in error["message"]
    assert error["param"] == "input[0].content[1].type"
    assert not engine_of(state).requests


@pytest.mark.parametrize("text", [TEXT, REASONED, CUT])
def test_response_is_a_response_resource(text: str) -> None:
    for fields in ({}, {"max_output_tokens": 3}, {"metadata": {"a": "b"}, "reasoning": {"effort": "low"}}):
        spec.ResponseResource.model_validate(respond(make_state(text), tools=[function("f")], **fields))


@pytest.mark.parametrize("text", [TEXT, REASONED, CUT])
def test_every_event_is_one_of_the_specification(text: str) -> None:
    events = stream(make_state(text), {"input": "Hello", "tools": [function("f")]})
    assert "response.reasoning.delta" in {event["type"] for event in events}


MAKERS: dict[str, Callable[[], Json]] = {
    "no input": lambda: {"model": "scripted"},
    "unknown model": lambda: {"model": "gpt-4", "input": "x"},
    "unknown item": lambda: {"input": [{"type": "frog"}]},
    "unknown tool": lambda: {"input": "x", "tools": [{"type": "frog"}]},
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_wrong_is_a_status_and_an_error_of_the_specification(name: str) -> None:
    answer = call(make_state(REASONED), "POST", PATH, json=MAKERS[name](), headers=HEADERS)
    assert answer.status_code in (400, 404)
    spec.ErrorPayload.model_validate(answer.json()["error"])
