"""Calls of /v1/responses, and the laws that every stream of events must keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from harmonium.server import ServerState
from tests.server.client import call

Json = dict[str, Any]

PATH = "/v1/responses"
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
# Open Responses, ResponseResource, "required".
REQUIRED_KEYS = frozenset(
    [
        "id",
        "object",
        "created_at",
        "completed_at",
        "status",
        "incomplete_details",
        "model",
        "previous_response_id",
        "instructions",
        "output",
        "error",
        "tools",
        "tool_choice",
        "truncation",
        "parallel_tool_calls",
        "text",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "top_logprobs",
        "temperature",
        "reasoning",
        "usage",
        "max_output_tokens",
        "max_tool_calls",
        "store",
        "background",
        "service_tier",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
    ]
)

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
_RESPONSE: TypeAdapter[Any] = TypeAdapter(Response)


def respond(state: ServerState, input: Any = "Hello", **fields: Any) -> Json:  # noqa: A002
    """One response in one piece; it must be well formed."""
    answer = call(state, "POST", PATH, json={"input": input, **fields})
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    check_response(body)
    return body


def stream(state: ServerState, input: Any = "Hello", **fields: Any) -> list[Json]:  # noqa: A002
    """The events of one response; they must keep the laws."""
    answer = call(state, "POST", PATH, json={"input": input, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer)
    check_events(events)
    return events


def events_of(answer: httpx.Response | str) -> list[Json]:
    """The events of a stream; the name of each is the type in its data."""
    events = []
    text = answer if isinstance(answer, str) else answer.text
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def check_response(body: Json) -> None:
    """All required keys are there, and the SDK's strict types take it."""
    assert set(body) >= REQUIRED_KEYS
    assert len(REQUIRED_KEYS) == 31
    _RESPONSE.validate_python(body)


def check_events(events: list[Json]) -> None:
    """Every event is one of the SDK's; numbers have no gaps; what opens is closed; there is one end."""
    for event in events:
        _EVENT.validate_python(event)
        if "response" in event:
            check_response(event["response"])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    start = ["response.created", "response.in_progress"]
    assert kinds[:2] == start or kinds[:3] == [start[0], "response.queued", start[1]]
    assert [kind for kind in kinds if kind in TERMINAL] == [kinds[-1]]
    items = [event for event in events if "output_index" in event]
    assert items == events[kinds.index("response.in_progress") + 1 : -1]
    places = [event["output_index"] for event in items]
    assert places == sorted(places)
    done = [
        _check_item([event for event in items if event["output_index"] == n]) for n in dict.fromkeys(places)
    ]
    assert done == events[-1]["response"]["output"]


def _check_item(events: list[Json]) -> Json:
    """The events of one item, in their order. Returns the item as it was at its end."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert (kinds[0], kinds[-1]) == ("output_item.added", "output_item.done")
    item: Json = events[-1]["item"]
    assert {event.get("item_id", item["id"]) for event in events} == {item["id"]}
    assert events[0]["item"]["id"] == item["id"]
    assert events[0]["item"]["status"] == "in_progress"
    stem, field = {
        "reasoning": ("reasoning_text", "text"),
        "message": ("output_text", "text"),
        "function_call": ("function_call_arguments", "arguments"),
        "custom_tool_call": ("custom_tool_call_input", "input"),
    }[item["type"]]
    has_parts = item["type"] in ("reasoning", "message")
    inner = kinds[2:-2] if has_parts else kinds[1:-1]
    if has_parts:
        assert (kinds[1], kinds[-2]) == ("content_part.added", "content_part.done")
        assert events[-2]["part"] == item["content"][0]
    assert inner[-1] == f"{stem}.done"
    assert set(inner[:-1]) <= {f"{stem}.delta"}
    deltas = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    whole = item["content"][0]["text"] if has_parts else item[field]
    assert (
        deltas == whole == next(event[field] for event in events if event["type"] == f"response.{stem}.done")
    )
    return item


def without_ids(body: Json) -> Json:
    """A response without what differs between two runs of the same request."""
    text = json.dumps(body)
    for name, value in _ids(body):
        text = text.replace(value, name)
    return {
        key: value for key, value in json.loads(text).items() if key not in ("created_at", "completed_at")
    }


def _ids(body: Json) -> list[tuple[str, str]]:
    found = [("RESPONSE", body["id"])]
    for index, item in enumerate(body["output"]):
        found.append((f"ITEM{index}", item["id"]))
        if "call_id" in item:
            found.append((f"CALL{index}", item["call_id"]))
    return found


def texts(body: Json, kind: str) -> list[str]:
    """The texts of the items of this type, in order."""
    field: dict[str, Callable[[Json], str]] = {
        "reasoning": lambda item: item["content"][0]["text"],
        "message": lambda item: item["content"][0]["text"],
        "function_call": lambda item: item["arguments"],
        "custom_tool_call": lambda item: item["input"],
    }
    return [field[kind](item) for item in body["output"] if item["type"] == kind]


def function(name: str, **properties: Any) -> Json:
    """A tool that takes an object."""
    return {
        "type": "function",
        "name": name,
        "description": f"Calls {name}.",
        "parameters": {"type": "object", "properties": properties},
        "strict": False,
    }
