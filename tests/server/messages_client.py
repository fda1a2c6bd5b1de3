"""Messages as Anthropic's API has them: requests, and what the events of a stream add up to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from pydantic_core import from_json

from harmonium.server import ServerState
from tests.server.client import HELLO, call

_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": {"type": "object", "properties": {}}, **fields}


def send(
    state: ServerState, messages: Sequence[Any] = tuple(HELLO), path: str = "", **fields: Any
) -> httpx.Response:
    """One request; 500 tokens unless fields say otherwise."""
    body = {"model": "scripted", "messages": list(messages), "max_tokens": 500, **fields}
    return call(state, "POST", f"/v1/messages{path}", json=body)


def message_of(response: httpx.Response) -> dict[str, Any]:
    """The message, which Anthropic's types must know."""
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()
    Message.model_validate(message, strict=True)
    return message


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, whose object must be whole."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"type", "message"}
    return error


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each under its own name."""
    assert response.status_code == 200, response.text
    events = []
    for part in filter(None, response.text.split("\n\n")):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def fold(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream adds up to. Its events must be known to Anthropic's types, and in order."""
    first, ping, *middle, delta, stop = events
    assert (first["type"], ping, delta["type"], stop) == (
        "message_start",
        {"type": "ping"},
        "message_delta",
        {"type": "message_stop"},
    )
    for event in (first, *middle, delta, stop):
        _EVENT.validate_python(event, strict=True)
    message: dict[str, Any] = first["message"]
    assert message["content"] == []
    content: list[dict[str, Any]] = message["content"]
    is_open, sent = False, ""
    for event in middle:
        match event["type"]:
            case "content_block_start":
                assert not is_open and event["index"] == len(content)
                content.append(dict(event["content_block"]))
                is_open, sent = True, ""
            case "content_block_delta":
                assert is_open and event["index"] == len(content) - 1
                sent = _add(content[-1], event["delta"], sent)
            case "content_block_stop":
                assert is_open and event["index"] == len(content) - 1
                is_open = False
            case other:
                raise AssertionError(other)
    assert not is_open
    message |= delta["delta"]
    message["usage"] |= delta["usage"]
    if "harmony_diagnostics" in delta:
        message["harmony_diagnostics"] = delta["harmony_diagnostics"]
    return message


def _add(block: dict[str, Any], delta: dict[str, Any], sent: str) -> str:
    kind = delta["type"]
    if kind == "input_json_delta":
        assert block["type"] == "tool_use"
        sent += delta["partial_json"]
        block["input"] = from_json(sent, allow_partial=True)
        return sent
    name = kind.removesuffix("_delta")
    assert block["type"] == ("thinking" if name == "signature" else name)
    block[name] += delta[name]
    return sent


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its id and the ids of its calls, which are new each time, taken out."""
    content = [{**block, "id": None} if "id" in block else block for block in message["content"]]
    return {**message, "id": None, "content": content}
