"""Responses under the grammar: over a model with random weights, and what is refused without it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from harmonium.config import EngineConfig
from harmonium.engine.create import create_engine
from harmonium.harmony.grammar import TurnRules
from harmonium.server import ServerConfig, ServerState
from harmonium.server.responses_rules import response_rules
from harmonium.server.responses_schema import ResponsesRequest
from harmonium.server.responses_tools import ToolChoice, ToolTable
from harmonium.server.turn_rules import MAX_PARALLEL_CALLS
from harmonium.testing import tiny_checkpoint_path
from tests.scripted_chat import FINAL
from tests.server.client import call, error_of, make_state
from tests.server.responses_client import PATH, Json, function, respond, stream, texts

SCHEMA: Json = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL: Json = {"type": "function", "name": "get", "parameters": SCHEMA, "strict": True}
PATCH: Json = {
    "type": "custom",
    "name": "apply_patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "BEGIN" /[a-z]{1,8}/ "END"'},
}
OK = FINAL.format("ok")


@pytest.fixture(scope="module")
def state() -> Iterator[ServerState]:
    engine = create_engine(tiny_checkpoint_path(), EngineConfig(context_length=2048))
    yield ServerState(ServerConfig(), engine)
    asyncio.run(engine.close())


def _ask(state: ServerState, **fields: Any) -> Json:
    settings: Json = {"max_output_tokens": 300, "reasoning": {"max_tokens": 4}, "temperature": 1.5, "seed": 3}
    return stream(state, "Hi", **{**settings, **fields})[-1]["response"]


def _calls(state: ServerState, **fields: Any) -> list[Json]:
    """Calls of the turns that came to an end: random weights may also write a preamble without one."""
    settings: Json = {"max_output_tokens": 60, "reasoning": {"max_tokens": 0}}
    bodies = [_ask(state, seed=seed, **settings, **fields) for seed in range(12)]
    whole = [body for body in bodies if body["status"] == "completed"]
    assert whole, "no seed made a call"
    return [body["output"][-1] for body in whole]


def test_answer_follows_its_schema_with_reasoning_before_it(state: ServerState) -> None:
    form = {"type": "json_schema", "name": "out", "schema": SCHEMA, "strict": True}
    body = _ask(state, text={"format": form})
    assert body["status"] == "completed"
    jsonschema.validate(json.loads(texts(body, "message")[-1]), SCHEMA)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get"}])
def test_demanded_tool_is_called_with_valid_arguments(state: ServerState, choice: Any) -> None:
    for item in _calls(state, tools=[TOOL], tool_choice=choice):
        assert (item["type"], item["name"]) == ("function_call", "get")
        jsonschema.validate(json.loads(item["arguments"]), SCHEMA)


def test_custom_tool_is_given_text_of_its_grammar(state: ServerState) -> None:
    choice = {"type": "custom", "name": "apply_patch"}
    for item in _calls(state, tools=[TOOL, PATCH], tool_choice=choice):
        assert (item["type"], item["name"]) == ("custom_tool_call", "apply_patch")
        assert re.fullmatch("BEGIN[a-z]{1,8}END", item["input"])


def test_no_tool_is_called_when_the_choice_is_none(state: ServerState) -> None:
    body = _ask(state, tools=[TOOL], tool_choice="none", max_output_tokens=60)
    assert [item for item in body["output"] if item["type"].endswith("_call")] == []


def test_keyword_that_is_not_enforced_is_named_in_the_response() -> None:
    tool = function("f")
    tool["parameters"]["not"] = {"required": ["z"]}
    body = respond(make_state(OK), tools=[tool])
    assert any("not" in warning and "'f'" in warning for warning in body["warnings"])
    strict = {**tool, "strict": True}
    error_of(call(make_state(OK), "POST", PATH, json={"input": "x", "tools": [strict]}), 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required", "tools": [function("f")]}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"reasoning": {"max_tokens": 5}}, "reasoning.max_tokens"),
    ],
)
def test_what_only_the_grammar_holds_is_refused_without_it(fields: Json, param: str) -> None:
    for state, extra in ((make_state(OK, uses_grammar=False), {}), (make_state(OK), {"use_grammar": False})):
        answer = call(state, "POST", PATH, json={"input": "x", **fields, **extra})
        assert error_of(answer, 400)["param"] == param


def test_codex_is_served_without_the_grammar_and_told() -> None:
    state = make_state(OK, uses_grammar=False)
    body = respond(state, tools=[TOOL, PATCH], parallel_tool_calls=True)
    assert len([warning for warning in body["warnings"] if "grammar is off" in warning]) == 3


def test_parallel_calls_are_bounded() -> None:
    def calls(**fields: Any) -> int:
        rules, _ = response_rules(
            ResponsesRequest(input="x", **fields), ToolTable(), ToolChoice(), ServerConfig()
        )
        assert isinstance(rules, TurnRules)
        return rules.max_calls

    assert calls() == calls(parallel_tool_calls=False) == 1
    assert calls(parallel_tool_calls=True) == MAX_PARALLEL_CALLS
    assert calls(parallel_tool_calls=True, max_tool_calls=2) == 2


def test_several_calls_of_a_turn_are_several_items() -> None:
    text = (
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":1}<|call|><|start|>assistant'
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":2}<|call|><|start|>functions'
    )
    body = respond(make_state(text), tools=[function("f")], parallel_tool_calls=True)
    assert texts(body, "function_call") == ['{"a":1}', '{"a":2}']
    assert len({item["call_id"] for item in body["output"]}) == 2
