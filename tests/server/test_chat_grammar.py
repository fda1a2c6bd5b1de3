"""FAULTS.md section C over POST /v1/chat/completions: what a turn is held to.

The model is a script under `"grammar": true`: a token that the request's grammar forbids is an error, so a
200 means that the turn was legal.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from harmonium.engine import Script, ScriptedEngine
from harmonium.harmony.grammar import TurnRules
from harmonium.server import ServerConfig, ServerState
from harmonium.server.chat_schema import ChatCompletionRequest
from harmonium.server.turn_rules import MAX_PARALLEL_CALLS, turn_rules
from tests.scripted_chat import gen
from tests.server.chat_stream import fold
from tests.server.client import HELLO, chat, chunks_of, engine_of, error_of

THINK = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>{}<|return|>"
JSON_FINAL = "<|channel|>final <|constrain|>json<|message|>{}<|return|>"
CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}


def function(name: str, *, strict: bool | None = None, schema: Any = None) -> dict[str, Any]:
    properties = {"a": {"type": "integer"}}
    parameters = schema or {
        "type": "object",
        "properties": properties,
        "required": ["a"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


TOOLS = [function("calculate"), function("get_weather")]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def make(script: str, **config: Any) -> ServerState:
    return ServerState(ServerConfig(**config), ScriptedEngine([Script(gen(script), obeys_constraint=True)]))


def is_legal(script: str, **fields: Any) -> bool:
    """Whether the grammar of the request lets the model write this, whole and streamed."""
    state = make(script)
    response = chat(state, **fields)
    assert response.status_code in (200, 500), response.text
    if response.status_code == 200:
        choice, _ = fold(chunks_of(chat(state, stream=True, **fields)))
        assert choice["finish_reason"] == response.json()["choices"][0]["finish_reason"]
        return True
    assert error_of(response, 500)["code"] == "engine_error"
    return False


PERSON = '{"name":"Ada","age":36}'


@pytest.mark.parametrize(
    ("script", "legal"),
    [
        (THINK + JSON_FINAL.format(PERSON), True),
        (THINK + FINAL.format(PERSON), True),
        (JSON_FINAL.format(PERSON), True),
        (THINK + FINAL.format(f"```json\n{PERSON}\n```"), False),
        (THINK + FINAL.format('{"name":"Ada"}'), False),
        (THINK + FINAL.format('{"name":"Ada","age":"old"}'), False),
        (THINK + FINAL.format(PERSON + " That is all."), False),
    ],
)
def test_b52_b53_b54_answer_follows_the_schema_and_reasoning_stays_free(script: str, legal: bool) -> None:
    assert is_legal(script, response_format=FORMAT) == legal


@pytest.mark.parametrize(
    ("choice", "script", "legal"),
    [
        ("required", THINK + CALL.format("calculate", '{"a":1}'), True),
        ("required", THINK + FINAL.format("Hello!"), False),
        (NAMED, CALL.format("get_weather", '{"a":1}'), True),
        (NAMED, CALL.format("calculate", '{"a":1}'), False),
        (NAMED, FINAL.format("Hello!"), False),
        ("none", THINK + FINAL.format("Hello!"), True),
        ("none", CALL.format("calculate", '{"a":1}'), False),
        ("auto", CALL.format("calculate", '{"a":1}'), True),
        ("auto", FINAL.format("Hello!"), True),
        (None, CALL.format("calculate", '{"a":"x"}'), False),
        (None, CALL.format("unknown", "{}"), False),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required", "tools": [{"type": "function", "function": {"name": "calculate"}}],
                },
            },
            CALL.format("get_weather", '{"a":1}'),
            False,
        ),
    ],
)  # fmt: skip
def test_b57_b58_tool_choice_holds(choice: Any, script: str, legal: bool) -> None:
    assert is_legal(script, tools=TOOLS, tool_choice=choice) == legal


def test_b58_none_without_tools_is_fine() -> None:
    assert is_legal(FINAL.format("Hello!"), tool_choice="none")


def test_b59_several_calls_only_when_the_request_says_so() -> None:
    two = (
        CALL.format("calculate", '{"a":1}')
        + "<|start|>assistant"
        + CALL.format("get_weather", '{"a":2}')
        + "<|start|>functions"
    )
    state = make(two)
    message = chat(state, tools=TOOLS, parallel_tool_calls=True).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["calculate", "get_weather"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": str(number)}
        for number, call in enumerate(message["tool_calls"])
    ]
    assert chat(state, [*HELLO, message, *results], tools=TOOLS).status_code == 200
    for parallel in (False, None):
        one = chat(make(two), tools=TOOLS, parallel_tool_calls=parallel).json()["choices"][0]
        assert len(one["message"]["tool_calls"]) == 1
        assert one["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("script", "legal"),
    [
        (THINK + CALL.format("calculate", '{"a":1}'), True),
        (THINK + JSON_FINAL.format(PERSON), True),
        (THINK + FINAL.format("no"), False),
        (THINK + CALL.format("calculate", '{"b":1}'), False),
    ],
)
def test_b61_schema_tools_and_reasoning_hold_together(script: str, legal: bool) -> None:
    tools = [function("calculate", strict=True)]
    assert is_legal(script, tools=tools, response_format=FORMAT) == legal


def test_b72_reasoning_budget_closes_an_endless_analysis() -> None:
    script = (
        "<|channel|>analysis<|message|>"
        + "wait." * 3
        + "<|end|><|start|>assistant<|channel|>final<|message|>x<|return|>"
    )
    budget = {"reasoning": {"max_tokens": 6}}
    assert is_legal(script, **budget)
    assert not is_legal(script.replace("wait." * 3, "wait. " * 40), **budget)


def test_regex_and_lark_answers_are_our_extension() -> None:
    regex = {"type": "grammar", "syntax": "regex", "definition": "[0-9]{3}"}
    lark = {"type": "grammar", "syntax": "lark", "definition": 'start: "yes" | "no"'}
    assert is_legal(FINAL.format("123"), response_format=regex)
    assert not is_legal(FINAL.format("12a"), response_format=regex)
    assert is_legal(FINAL.format("yes"), response_format=lark)
    assert not is_legal(FINAL.format("maybe"), response_format=lark)


def test_custom_tool_s_grammar_holds_its_input() -> None:
    form = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "ls( -l)?"}}
    tools = [{"type": "custom", "custom": {"name": "shell", "format": form}}]
    header = "<|channel|>commentary to=functions.shell<|message|>"
    assert is_legal(f"{header}ls -l<|call|>", tools=tools)
    assert not is_legal(f"{header}rm -r<|call|>", tools=tools)


def test_keyword_that_cannot_be_enforced_is_refused_when_strict_and_told_otherwise() -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    strict = {"type": "json_schema", "json_schema": {**form["json_schema"], "strict": True}}  # type: ignore[dict-item]
    assert "uniqueItems" in error_of(chat(make(FINAL.format("[1]")), response_format=strict), 400)["message"]
    whole = chat(make(FINAL.format("[1]")), response_format=form).json()
    assert len(whole["warnings"]) == 1 and "uniqueItems" in whole["warnings"][0]
    chunks = chunks_of(chat(make(FINAL.format("[1]")), response_format=form, stream=True))
    assert chunks[0]["warnings"] == whole["warnings"]
    assert all("warnings" not in chunk for chunk in chunks[1:])


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "grammar", "syntax": "regex", "definition": "("}},
        {"response_format": {"type": "grammar", "syntax": "lark", "definition": "start: nowhere"}},
        {"tools": [function("f", strict=True, schema={"type": "object", "not": {}})]},
        {"tools": [function("f", strict=True, schema={"$ref": "#/nowhere"})]},
    ],
)
def test_grammar_that_cannot_be_compiled_is_a_400(fields: dict[str, Any]) -> None:
    state = make(FINAL.format("x"))
    error_of(chat(state, **fields), 400)
    error_of(chat(state, stream=True, **fields), 400)
    assert state.num_held == 0


def rules(body: dict[str, Any], **config: Any) -> TurnRules | None:
    request = ChatCompletionRequest.model_validate({"messages": HELLO, **body})
    return turn_rules(request, ServerConfig(**config))


def test_request_becomes_rules() -> None:
    assert rules({}) == TurnRules()
    assert rules({"use_grammar": True}) == TurnRules()
    found = rules({"tools": TOOLS, "parallel_tool_calls": True, "tool_choice": "required"})
    assert found == replace(TurnRules(), tool_choice="required", max_calls=MAX_PARALLEL_CALLS)
    assert rules({"tools": [function("f", strict=True)]}) == TurnRules(strict_tools=frozenset({"f"}))


@pytest.mark.parametrize("is_the_request_s_wish", [True, False])
def test_without_the_grammar_what_only_it_can_hold_is_refused(is_the_request_s_wish: bool) -> None:
    config = {} if is_the_request_s_wish else {"uses_grammar": False}
    asked = {"use_grammar": False} if is_the_request_s_wish else {}
    for name, fields in (
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": "required"}),
        ("tools", {"tools": [function("f", strict=True)]}),
        ("parallel_tool_calls", {"tools": TOOLS, "parallel_tool_calls": True}),
        ("reasoning.max_tokens", {"reasoning": {"max_tokens": 5}}),
    ):
        error = error_of(chat(make(FINAL.format("x"), **config), **asked, **fields), 400)
        assert error["param"] == name
    state = make(FINAL.format("x"), **config)
    assert chat(state, tools=TOOLS, tool_choice="none", **asked).status_code == 200
    request = engine_of(state).requests[-1]
    assert request.constraint is None
    assert json.dumps(request.token_ids)
