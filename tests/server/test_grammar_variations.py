"""FAULTS.md section C through Responses and Messages: the grammar holds in every API.

As in test_chat_grammar.py the model is a script whose tokens must be legal, so a 200 means that they were.
"""

from __future__ import annotations

from typing import Any

import pytest

from harmonium.engine import Script, ScriptedEngine
from harmonium.server import ServerConfig, ServerState
from tests.scripted_chat import gen
from tests.server.client import HELLO, call
from tests.server.responses_client import PATH, check_events, events_of

THINK = "<|channel|>analysis<|message|>hm {[ ```<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>{}<|return|>"
JSON_FINAL = "<|channel|>final <|constrain|>json<|message|>{}<|return|>"
CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ARGUMENTS = {**SCHEMA, "properties": {"a": {"type": "integer"}}, "required": ["a"]}
PERSON = '{"name":"Ada","age":36}'
NAMES = ("calculate", "get_weather")


def is_legal(path: str, script: str, **fields: Any) -> bool:
    """Whether the request lets the model write this, whole and streamed."""
    common = (
        {"input": "Hello"} if path == PATH else {"model": "scripted", "max_tokens": 400, "messages": HELLO}
    )
    body = {**common, **fields}
    engine = ScriptedEngine([Script(gen(script), obeys_constraint=True)])
    state = ServerState(ServerConfig(), engine)
    whole = call(state, "POST", path, json=body)
    streamed = call(state, "POST", path, json={**body, "stream": True})
    assert streamed.status_code == 200, streamed.text
    assert whole.status_code in (200, 500), whole.text
    if path == PATH:
        events = events_of(streamed)
        check_events(events)
        assert (events[-1]["type"] == "response.failed") == (whole.status_code == 500)
    else:
        assert ("event: error" in streamed.text) == (whole.status_code == 500)
    return whole.status_code == 200


def answer_fields(path: str, schema: Any) -> dict[str, Any]:
    """The fields that demand an answer of this schema."""
    if path == PATH:
        return {"text": {"format": {"type": "json_schema", "name": "out", "strict": True, "schema": schema}}}
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def tool_fields(path: str, choice: str | None) -> dict[str, Any]:
    """Two tools, and the choice: auto, none, required, or the name of one."""
    if path == PATH:
        tools = [
            {"type": "function", "name": name, "parameters": ARGUMENTS, "strict": True} for name in NAMES
        ]
        told: Any = {"type": "function", "name": choice} if choice in NAMES else choice
    else:
        tools = [{"name": name, "input_schema": ARGUMENTS, "strict": True} for name in NAMES]
        kind = {"required": "any"}.get(choice or "", choice)
        told = {"type": "tool", "name": choice} if choice in NAMES else {"type": kind}
    return {"tools": tools} if choice is None else {"tools": tools, "tool_choice": told}


BOTH = pytest.mark.parametrize("path", [PATH, "/v1/messages"])


@BOTH
@pytest.mark.parametrize(
    ("script", "legal"),
    [
        (THINK + JSON_FINAL.format(PERSON), True),
        (THINK + FINAL.format(PERSON), True),
        (JSON_FINAL.format(PERSON), True),
        (THINK + THINK + FINAL.format(PERSON), True),
        (THINK + FINAL.format(f"```json\n{PERSON}\n```"), False),
        (FINAL.format("Sure! " + PERSON), False),
        (FINAL.format('{"name":"Ada"}'), False),
        (FINAL.format('{"name":"Ada","age":36,"x":1}'), False),
        (FINAL.format('{"name":"Ada","age":36.5}'), False),
        (FINAL.format(PERSON + PERSON), False),
        (
            f"{THINK}<|channel|>commentary<|message|>Here it is.<|end|><|start|>assistant"
            + FINAL.format(PERSON),
            False,
        ),
        (CALL.format("f", "{}"), False),
    ],
)
def test_b52_b53_b54_b60_answer_follows_the_schema_and_reasoning_stays_free(
    path: str, script: str, legal: bool
) -> None:
    assert is_legal(path, script, **answer_fields(path, SCHEMA)) == legal


@BOTH
@pytest.mark.parametrize(
    ("choice", "script", "legal"),
    [
        ("required", THINK + CALL.format("calculate", '{"a":1}'), True),
        ("required", FINAL.format("Hello!"), False),
        ("get_weather", THINK + CALL.format("get_weather", '{"a":1}'), True),
        ("get_weather", CALL.format("calculate", '{"a":1}'), False),
        ("get_weather", THINK + FINAL.format("Hello!"), False),
        ("none", THINK + FINAL.format("Hello!"), True),
        ("none", CALL.format("calculate", '{"a":1}'), False),
        ("auto", CALL.format("calculate", '{"a":1}'), True),
        ("auto", FINAL.format("Hello!"), True),
        (None, CALL.format("calculate", '{"a":"x"}'), False),
        (None, CALL.format("calculate", "{}"), False),
        (None, CALL.format("unknown", "{}"), False),
        (None, "<|channel|>commentary to=browser.search code<|message|>{}<|call|>", False),
    ],
)
def test_b57_b58_tool_choice_holds(path: str, choice: str | None, script: str, legal: bool) -> None:
    assert is_legal(path, script, **tool_fields(path, choice)) == legal


@BOTH
@pytest.mark.parametrize(
    ("script", "legal"),
    [
        (THINK + CALL.format("calculate", '{"a":1}'), True),
        (THINK + FINAL.format(PERSON), True),
        (THINK + FINAL.format("It is 7."), False),
        (THINK + CALL.format("calculate", '{"a":1,"b":2}'), False),
    ],
)
def test_b61_schema_tools_and_reasoning_hold_together(path: str, script: str, legal: bool) -> None:
    fields = {**tool_fields(path, "auto"), **answer_fields(path, SCHEMA)}
    assert is_legal(path, script, **fields) == legal


TWO_CALLS = CALL.format("calculate", '{"a":1}') + "<|start|>assistant" + CALL.format("get_weather", '{"a":2}')


@BOTH
@pytest.mark.parametrize("is_parallel", [True, False, None])
def test_b59_a_second_call_only_when_the_request_says_so(path: str, is_parallel: bool | None) -> None:
    fields = tool_fields(path, "auto")
    if path == PATH:
        fields["parallel_tool_calls"] = is_parallel
    elif is_parallel is not None:
        fields["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": not is_parallel}
    engine = ScriptedEngine([gen(TWO_CALLS + "<|start|>functions.calculate")])
    common = (
        {"input": "Hello"} if path == PATH else {"model": "scripted", "max_tokens": 400, "messages": HELLO}
    )
    state = ServerState(ServerConfig(), engine)
    body = call(state, "POST", path, json={**common, **fields}).json()
    found = body["output"] if path == PATH else body["content"]
    calls = [item for item in found if item["type"] in ("function_call", "tool_use")]
    assert len(calls) == (2 if is_parallel else 1)


@BOTH
@pytest.mark.parametrize("budget", [1, 5, 40])
def test_b72_endless_reasoning_is_closed_at_its_budget(path: str, budget: int) -> None:
    endless = "<|channel|>analysis<|message|>" + "wait. " * 200
    if path == PATH:
        fields: dict[str, Any] = {"reasoning": {"max_tokens": budget}}
    else:
        fields = {"thinking": {"type": "enabled", "budget_tokens": budget}}
    assert not is_legal(path, endless, **fields), "the script went on after its budget"
    closed = (
        "<|channel|>analysis<|message|>" + "wait" * budget + "<|end|><|start|>assistant" + FINAL.format("x")
    )
    assert is_legal(path, closed, **fields)
