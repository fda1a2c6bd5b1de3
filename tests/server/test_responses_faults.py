"""Section A of the catalogue of faults, through /v1/responses: what the model may write, what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from harmonium.engine import ScriptedEngine
from harmonium.engine.scripted import Script
from harmonium.server import ServerConfig, ServerState
from tests.scripted_chat import gen
from tests.server.client import call, error_of, make_state
from tests.server.responses_client import PATH, Json, function, respond, stream, texts, without_ids

CALL_F = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
START = "<|start|>assistant"


@dataclass(frozen=True)
class Case:
    """One fault. calls: (name, arguments). status: of the response."""

    gen: str
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    status: str = "completed"
    tools: tuple[str, ...] = ("f", "get_weather", "query_db", "write", "ask_followup")
    diagnoses: bool = False


CASES = {
    "B01 name with a glued channel marker": Case(
        "<|channel|>commentary to=functions.query_db<|channel|>commentary <|constrain|>json<|message|>"
        '{"q":"select 1"}<|call|>',
        calls=[("query_db", '{"q":"select 1"}')],
        diagnoses=True,
    ),
    "B03 start twice": Case(
        "<|channel|>analysis<|message|>x<|end|><|start|><|start|>assistant<|channel|>final<|message|>hi<|return|>",
        content=["hi"],
        reasoning=["x"],
        diagnoses=True,
    ),
    "B03 role twice": Case(
        "<|channel|>analysis<|message|>x<|end|><|start|>assistantassistant<|channel|>final<|message|>hi<|return|>",
        content=["hi"],
        reasoning=["x"],
        diagnoses=True,
    ),
    "B05 body without a channel": Case(
        f"User asks for X. Must refuse.<|end|>{START}<|channel|>analysis<|message|>Must refuse.<|end|>"
        f"{START}<|channel|>final<|message|>Sorry, I can't help with that.<|return|>",
        content=["Sorry, I can't help with that."],
        reasoning=["User asks for X. Must refuse.", "Must refuse."],
        diagnoses=True,
    ),
    "B06 no message token": Case(
        "<|channel|>final Hello there<|return|>", content=["Hello there"], diagnoses=True
    ),
    "B06 nothing but a header": Case("<|channel|>analysis<|return|>", diagnoses=True),
    "B07 goes on after the call": Case(
        f"{CALL_F}commentary<|call|><|return|>",
        calls=[("f", "{}")],
    ),
    "B10 preamble": Case(
        f"<|channel|>commentary<|message|>I will check both cities.<|end|>{START}<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city":"Oslo"}<|call|>',
        content=["I will check both cities."],
        calls=[("get_weather", '{"city":"Oslo"}')],
    ),
    "B11 many messages": Case(
        f"<|channel|>analysis<|message|>a<|end|>{START}<|channel|>analysis<|message|>b<|end|>{START}"
        f"<|channel|>analysis<|message|>c<|end|>{START}<|channel|>commentary<|message|>d<|end|>{START}"
        f"<|channel|>final<|message|>e<|end|>{START}<|channel|>final<|message|>f<|return|>",
        content=["d", "e", "f"],
        reasoning=["a", "b", "c"],
    ),
    "B13 no analysis": Case('<|channel|>final<|message|>{"issues":[]}<|return|>', content=['{"issues":[]}']),
    "B14 ends in a header": Case(
        f"<|channel|>analysis<|message|>ok<|end|>{START}<|channel|>", reasoning=["ok"], status="incomplete"
    ),
    "B16 recipient without namespace": Case(
        '<|channel|>commentary to=ask_followup <|constrain|>json<|message|>{"q":"?"}<|call|>',
        calls=[("ask_followup", '{"q":"?"}')],
    ),
    "B18 arguments cut off": Case(
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":{"b":1}',
        calls=[("f", '{"a":{"b":1}')],
        status="incomplete",
    ),
    "B19 arguments that are no JSON": Case(
        "<|channel|>commentary to=functions.write <|constrain|>json<|message|>ls -R\n<|call|>",
        calls=[("write", "ls -R\n")],
    ),
    "B21 commentary without tools": Case(
        "<|channel|>commentary<|message|><code_interpreter>1+1</code_interpreter><|end|><|return|>",
        content=["<code_interpreter>1+1</code_interpreter>"],
        tools=(),
    ),
    "B23 channel words as text": Case(
        "<|channel|>final<|message|>the word assistantfinal<|return|>", content=["the word assistantfinal"]
    ),
}


def _fields(case: Case) -> dict[str, Any]:
    return {"tools": [function(name) for name in case.tools]}


def _calls(body: Json) -> list[tuple[str, str]]:
    return [(item["name"], item["arguments"]) for item in body["output"] if item["type"] == "function_call"]


@pytest.mark.parametrize("name", CASES)
def test_fault_is_answered_as_the_catalogue_says(name: str) -> None:
    case = CASES[name]
    body = respond(make_state(case.gen), **_fields(case))
    assert texts(body, "message") == case.content
    assert texts(body, "reasoning") == case.reasoning
    assert _calls(body) == case.calls
    assert body["status"] == case.status
    assert bool(body["diagnostics"]) == case.diagnoses or case.status == "incomplete"
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + body["usage"]["output_tokens"]


@pytest.mark.parametrize("tokens_per_event", [1, 3, 50])
@pytest.mark.parametrize("name", CASES)
def test_stream_adds_up_to_the_response_of_the_same_request(name: str, tokens_per_event: int) -> None:
    case = CASES[name]
    state = make_state(case.gen, tokens_per_event=tokens_per_event)
    events = stream(state, **_fields(case))
    assert without_ids(events[-1]["response"]) == without_ids(respond(state, **_fields(case)))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.status == "completed"])
def test_own_output_is_accepted_back_verbatim(name: str) -> None:
    case = CASES[name]
    state = make_state(case.gen, "<|channel|>final<|message|>ok<|return|>")
    fields = {**_fields(case), "include": ["reasoning.encrypted_content"]}
    body = respond(state, **fields)
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "22C"}
        for item in body["output"]
        if item["type"] == "function_call"
    ]
    history = [
        {"role": "user", "content": "Hello"},
        *body["output"],
        *results,
        {"role": "user", "content": "Go on"},
    ]
    assert texts(respond(state, history, **fields), "message") == ["ok"]


def test_undeclared_tool_is_shown_as_a_call_that_is_not_to_be_made() -> None:
    text = '<|channel|>commentary to=browser.search code<|message|>{"query":"x"}<|call|>'
    body = respond(make_state(text))
    (item,) = body["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "browser.search", "incomplete")
    assert body["status"] == "completed"
    assert [found["code"] for found in body["diagnostics"]] == ["undeclared_tool"]


def test_strange_role_is_no_answer_and_no_crash() -> None:
    text = "<|channel|>analysis<|message|>x<|end|><|start|>bash<|channel|>commentary<|message|>{}<|call|>"
    body = respond(make_state(text), tools=[function("f")])
    assert _calls(body) == []
    assert body["diagnostics"]


@pytest.mark.parametrize("header", ["<|channel|>??", "<|channel|>commentary?commentary?"])
def test_garbage_header_costs_nothing_that_follows(header: str) -> None:
    rest = f"<|channel|>analysis<|message|>a<|end|>{START}<|channel|>final<|message|>b<|return|>"
    text = f"{header}<|end|>{START}{rest}"
    body = respond(make_state(text))
    assert texts(body, "message") == ["b"]
    assert texts(body, "reasoning")[-1] == "a"


def test_answer_that_is_cut_in_its_reasoning_is_incomplete() -> None:
    text = f"<|channel|>analysis<|message|>{'word ' * 40}<|end|>"
    body = respond(make_state(text), max_output_tokens=8)
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert texts(body, "reasoning") == ["word word word word word"]
    assert body["output"][0]["status"] == "incomplete"
    assert body["usage"]["output_tokens"] == 8


@pytest.mark.parametrize("most", range(1, 12))
def test_cut_at_any_token_gives_one_terminal_event(most: int) -> None:
    text = f"<|channel|>analysis<|message|>é 🎉 x<|end|>{START}<|channel|>final<|message|>🎉🎉<|return|>"
    events = stream(make_state(text), max_output_tokens=most)
    assert events[-1]["type"] == "response.incomplete"


def test_large_source_file_survives_as_an_argument() -> None:
    source = '/** {\\"k\\": [1]} */\\n' * 1000
    arguments = f'{{"path":"a.c","content":"{source}]"}}'
    text = f"<|channel|>commentary to=functions.write <|constrain|>json<|message|>{arguments}<|call|>"
    assert _calls(respond(make_state(text, tokens_per_event=100), tools=[function("write")])) == [
        ("write", arguments)
    ]


def test_failure_of_the_engine_is_a_500_or_the_event_response_failed() -> None:
    script = Script(gen("<|channel|>final<|message|>half an"), error="the kernel failed")
    state = ServerState(ServerConfig(), ScriptedEngine([script]))
    assert error_of(call(state, "POST", PATH, json={"input": "x"}), 500)["message"] == "the kernel failed"
    events = stream(state)
    failed = events[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the kernel failed"}
    assert failed["response"]["output"][0]["status"] == "incomplete"
