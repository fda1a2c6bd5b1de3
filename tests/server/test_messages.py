"""POST /v1/messages: what a request says reaches the model, and what cannot be done is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harmonium.engine import ScriptedEngine
from harmonium.harmony.grammar import TurnRules
from harmonium.server import ServerState
from harmonium.server.config import ServerConfig
from harmonium.server.messages_input import PreparedMessage, prepare_message
from harmonium.server.messages_schema import MessagesRequest
from harmonium.server.responses_seal import Seal
from tests.scripted_chat import REASONED, gen
from tests.server.client import HELLO, call, chat, engine_of, make_state, prompt_text
from tests.server.messages_client import (
    WEATHER,
    error_of,
    events_of,
    fold,
    message_of,
    send,
    tool,
    without_ids,
)

ANSWER = "<|channel|>final<|message|>x<|return|>"
CALL = (
    "<|channel|>analysis<|message|>need f<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"a":1}<|call|>'
)
ADAPTIVE = {"type": "adaptive"}
TOOLS = [tool("f"), tool("g")]


def prompt_of(*messages: dict[str, Any], **fields: Any) -> str:
    """What the model reads of these messages."""
    state = make_state(ANSWER)
    message_of(send(state, messages or tuple(HELLO), **fields))
    return prompt_text(state)


def prepared(state: ServerState | None = None, **fields: Any) -> PreparedMessage:
    body = MessagesRequest.model_validate(
        {"model": "scripted", "max_tokens": 50_000, "messages": HELLO, **fields}
    )
    return prepare_message(state or make_state(ANSWER), body, Seal(bytes(32)), "msg")


def rules(**fields: Any) -> TurnRules:
    found = prepared(**fields).chat_request.grammar
    assert found is not None
    return found


def refused(status: int = 400, **fields: Any) -> str:
    state = make_state(ANSWER)
    message = error_of(send(state, **fields), status)["message"]
    assert not engine_of(state).requests and state.num_held == 0
    assert isinstance(message, str)
    return message


def test_answer_holds_every_field_of_a_message() -> None:
    message = message_of(send(make_state(REASONED)))
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "scripted",
        "content": [{"type": "text", "text": "Hi there"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 68,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 14,
            "output_tokens_details": {"thinking_tokens": 2},
            "service_tier": "standard",
        },
    }


def test_thinking_is_shown_where_it_was_asked_for_or_tools_are_offered() -> None:
    def kinds(**fields: Any) -> list[str]:
        state = make_state(REASONED)
        whole = message_of(send(state, **fields))
        streamed = fold(events_of(send(state, stream=True, **fields)))
        found = [block["type"] for block in whole["content"]]
        assert found == [block["type"] for block in streamed["content"]]
        return found

    assert kinds() == ["text"]
    assert kinds(thinking={"type": "disabled"}, tools=TOOLS) == ["text"]
    assert kinds(tools=TOOLS) == ["thinking", "text"]
    assert kinds(thinking=ADAPTIVE) == ["thinking", "text"]
    assert kinds(thinking={"type": "enabled", "budget_tokens": 100}) == ["thinking", "text"]


@pytest.mark.parametrize(
    ("fields", "effort", "budget"),
    [
        ({}, "medium", None),
        ({"thinking": {"type": "disabled"}}, "low", 0),
        ({"thinking": ADAPTIVE}, "medium", None),
        ({"thinking": ADAPTIVE, "output_config": {"effort": "max"}}, "high", None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low", 1024),
        ({"thinking": {"type": "enabled", "budget_tokens": 10_000}}, "medium", 10_000),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, "high", 31_999),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 5}, "output_config": {"effort": "high"}},
            "high",
            5,
        ),
        ({"output_config": {"effort": "low"}}, "low", None),
    ],
)
def test_thinking_becomes_effort_and_budget(fields: dict[str, Any], effort: str, budget: int | None) -> None:
    request = prepared(**fields).chat_request
    assert request.conversation.reasoning_effort == effort
    assert request.grammar is not None and request.grammar.max_reasoning_tokens == budget


def test_tool_choice_becomes_rules_of_the_turn() -> None:
    def choice(**given: Any) -> tuple[Any, ...]:
        found = rules(tools=TOOLS, tool_choice=given)
        return found.tool_choice, found.allowed_tools, found.max_calls

    assert choice(type="auto") == ("auto", None, 1)
    assert choice(type="auto", disable_parallel_tool_use=True) == ("auto", None, 1)
    assert choice(type="any", disable_parallel_tool_use=False) == ("required", None, 16)
    assert choice(type="tool", name="g") == ("required", ("g",), 1)
    assert choice(type="none") == ("none", None, 1)
    assert rules(tools=[tool("f", strict=True), tool("g")]).strict_tools == frozenset({"f"})


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_schema_of_the_answer_is_held_and_told(name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "schema": schema}
    request = prepared(**{name: {"format": form} if name == "output_config" else form}).chat_request
    assert request.grammar is not None
    assert request.grammar.answer.kind == "json_schema" and request.grammar.answer.is_strict
    assert request.conversation.response_format is not None
    assert request.conversation.response_format.schema == schema


def test_without_the_grammar_what_only_it_could_hold_is_refused() -> None:
    state = make_state(ANSWER, uses_grammar=False)
    forms = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}
    for fields in ({"tools": TOOLS, "tool_choice": {"type": "any"}}, forms):
        assert "the grammar is off" in error_of(send(state, **fields), 400)["message"]
    none = prepared(state, tools=TOOLS, tool_choice={"type": "none"}).chat_request
    assert none.grammar is None and none.conversation.tools == ()
    budget = {"type": "enabled", "budget_tokens": 100}
    assert send(state, thinking=budget).headers["x-harmonium-ignored"] == "thinking.budget_tokens"


def test_sampling_and_stops_reach_the_engine() -> None:
    state = make_state(ANSWER)
    send(state, temperature=0.5, top_p=0.9, top_k=3, max_tokens=7, metadata={"user_id": "u"})
    sampling = engine_of(state).requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 3)
    assert sampling.max_tokens == 7


def test_stop_sequence_acts_on_visible_text_and_is_named() -> None:
    script = (
        "<|channel|>analysis<|message|>a STOP b<|end|><|start|>assistant<|channel|>final<|message|>"
        "one STOP two<|return|>"
    )
    for stream in (False, True):
        response = send(make_state(script), stop_sequences=["zzz", "STOP"], thinking=ADAPTIVE, stream=stream)
        message = fold(events_of(response)) if stream else message_of(response)
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "STOP")
        thinking, text = message["content"]
        assert (thinking["thinking"], text["text"]) == ("a STOP b", "one ")


def test_full_context_is_told_apart_from_max_tokens() -> None:
    info = replace(engine_of(make_state(ANSWER)).info, context_length=80)
    engine = ScriptedEngine([gen("<|channel|>final<|message|>" + "a " * 300)], info=info)
    state = ServerState(ServerConfig(), engine)
    assert message_of(send(state, max_tokens=5))["stop_reason"] == "max_tokens"
    assert message_of(send(state, max_tokens=400))["stop_reason"] == "model_context_window_exceeded"
    error = error_of(send(state, [{"role": "user", "content": "word " * 200}]), 400)
    assert error["message"].startswith("prompt is too long: ") and "80" in error["message"]


def test_system_text_and_blocks_become_the_instructions() -> None:
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc"},
        {"type": "text", "text": "You are a bot", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Answer in French"},
    ]
    later = {"role": "system", "content": "Answer in verse"}
    text = prompt_of(*HELLO, later, {"role": "user", "content": "Now"}, system=blocks)
    assert "# Instructions\n\nYou are a bot\n\nAnswer in French<|end|>" in text
    assert "billing" not in text
    assert text.index("Hello") < text.index("Answer in verse") < text.index("Now")
    assert "# Instructions\n\nBe brief<|end|>" in prompt_of(system="Be brief")


def test_own_answer_fed_back_renders_what_the_model_wrote() -> None:
    state = make_state(CALL)
    for display, stream in (("summarized", False), ("omitted", False), ("omitted", True)):
        thinking = {"type": "adaptive", "display": display}
        response = send(state, tools=TOOLS, thinking=thinking, stream=stream)
        message = fold(events_of(response)) if stream else message_of(response)
        shown = message["content"][0]["thinking"]
        assert shown == ("need f" if display == "summarized" else "")
        result = {"type": "tool_result", "tool_use_id": message["content"][1]["id"], "content": "42"}
        # The same server: the seal of another one would not open.
        answer = {"role": "assistant", "content": message["content"]}
        with_history = prompt_with(state, [*HELLO, answer, {"role": "user", "content": [result]}])
        expected = f"<|start|>assistant{CALL}" if display == "summarized" else CALL.split("assistant")[1]
        assert f"{expected}<|start|>functions.f to=assistant<|channel|>commentary<|message|>42<|end|>" in (
            with_history
        )


def prompt_with(state: ServerState, messages: list[dict[str, Any]]) -> str:
    message_of(send(state, messages, tools=TOOLS))
    return prompt_text(state)


def test_signature_brings_omitted_thinking_back_and_only_our_own() -> None:
    seal = Seal(bytes(range(32)))
    from harmonium.server.messages_history import read_history
    from harmonium.server.responses_seal import SealedReasoning

    def read(thinking: str, signature: str) -> list[tuple[str, tuple[int, ...] | None]]:
        block = {"type": "thinking", "thinking": thinking, "signature": signature}
        history = read_history(None, [{"role": "assistant", "content": [block]}], seal)
        return [(m.content, m.token_ids) for m in history.messages if m.channel == "analysis"]

    ours = seal.close(SealedReasoning("I think", (1, 2)))
    assert read("", ours) == [("I think", (1, 2))]
    assert read("I think", ours) == [("I think", (1, 2))]
    assert read("I was told", ours) == [("I was told", None)]
    assert read("I think", "EqQBforeign") == [("I think", None)]
    assert read("", Seal(bytes(32)).close(SealedReasoning("x", (1,)))) == []


def test_history_of_another_model_is_read() -> None:
    text = prompt_of(
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "abc"},
                {"type": "thinking", "thinking": "look up", "signature": "s"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "a", "name": "f", "input": {"n": "é"}},
                {"type": "tool_use", "id": "b", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": "boom", "is_error": True},
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "22"}]},
                {"type": "text", "text": "Go on."},
            ],
        },
        tools=TOOLS,
    )
    order = [
        "<|channel|>analysis<|message|>look up<|end|>",
        "<|channel|>commentary<|message|>Let me look.<|end|>",
        'to=functions.f <|constrain|>json<|message|>{"n":"é"}<|call|>',
        "to=functions.g <|constrain|>json<|message|>{}<|call|>",
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>22<|end|>",
        "<|start|>functions.g to=assistant<|channel|>commentary<|message|>Error: boom<|end|>",
        "<|start|>user<|message|>Go on.<|end|>",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_thinking_before_the_last_answer_is_dropped() -> None:
    blocks = [{"type": "thinking", "thinking": "SECRET", "signature": ""}, {"type": "text", "text": "A"}]
    text = prompt_of(*HELLO, {"role": "assistant", "content": blocks}, *HELLO)
    assert "SECRET" not in text and "<|channel|>final<|message|>A<|end|>" in text


def test_same_request_through_both_apis_reads_the_same() -> None:
    function = {"name": "get_weather", "description": WEATHER["description"]}
    function["parameters"] = WEATHER["input_schema"]
    state = make_state(ANSWER)
    chat(state, [{"role": "system", "content": "Be brief"}, *HELLO], tools=[{"function": function}])
    assert prompt_text(state) == prompt_of(system="Be brief", tools=[WEATHER])


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
CALLED = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages has 0"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, 'messages[0].content[0].type is "image"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            'messages[0].content[0].type is "document"',
        ),
        (
            {
                "messages": [
                    CALLED,
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}],
                    },
                ]
            },
            'messages[1].content[0].content[0].type is "image"',
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}, *HELLO]},
            'messages[0].content[0].type is "server_tool_use"',
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'messages[0].role is "tool"'),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0] is 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "zz"}]}]},
            'messages[0].content[0].tool_use_id is "zz"',
        ),
        ({"messages": [*HELLO, {"role": "assistant", "content": "The"}]}, "messages ends with one of the"),
        ({"system": [IMAGE]}, 'system[0].type is "image"'),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": None}, "max_tokens is null"),
        ({"temperature": 1e6}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0] has 0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
        ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "tools[0].input_schema.type"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1]"),
        ({"tool_choice": {"type": "any"}}, "tools is empty"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "h"}}, 'tool_choice.name is "h"'),
        ({"tools": TOOLS, "tool_choice": {"type": "maybe"}}, 'tool_choice.type is "maybe"'),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is missing"),
        ({"thinking": {"type": "enabled", "budget_tokens": 500}}, "fewer than max_tokens, which is 500"),
        ({"thinking": {"type": "between_tools"}}, 'thinking.type is "between_tools"'),
        ({"output_config": {"effort": "huge"}}, "output_config.effort is 'huge'"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "not"),
        ({"container": "c"}, "container is not supported"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    assert named in refused(**fields)


def test_threads_are_refused_in_the_words_that_make_clients_do_without() -> None:
    response = send(make_state(ANSWER), thread={"type": "create"})
    assert response.status_code == 400
    assert response.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}


def test_missing_fields_are_named() -> None:
    for name in ("model", "max_tokens", "messages"):
        body = {"model": "scripted", "max_tokens": 5, "messages": HELLO}
        del body[name]
        error = error_of(call(make_state(ANSWER), "POST", "/v1/messages", json=body), 400)
        assert error == {"type": "invalid_request_error", "message": f"{name} is missing"}


@pytest.mark.parametrize(
    ("status", "kind", "options"),
    [
        (401, "authentication_error", {"headers": {"x-api-key": "wrong"}}),
        (404, "not_found_error", {"json": {"model": "claude", "max_tokens": 5, "messages": HELLO}}),
        (413, "request_too_large", {"headers": {"content-length": "99999999999"}}),
        (415, "invalid_request_error", {"headers": {"content-type": "text/plain"}}),
        (403, "permission_error", {"headers": {"host": "evil.example"}}),
    ],
)
def test_failures_around_the_route_have_the_same_shape(
    status: int, kind: str, options: dict[str, Any]
) -> None:
    state = make_state(ANSWER, api_keys=("sk-a",))
    headers = {"x-api-key": "sk-a", **options.get("headers", {})}
    response = call(state, "POST", "/v1/messages", **{**options, "headers": headers})
    assert error_of(response, status)["type"] == kind


def test_unknown_path_and_draining_have_the_same_shape() -> None:
    state = make_state(ANSWER)
    assert error_of(call(state, "POST", "/v1/messages/batches", json={}), 404)["type"] == "not_found_error"
    state.drain()
    response = send(state)
    assert error_of(response, 503)["type"] == "overloaded_error"
    assert response.headers["retry-after"] == "5"


def test_either_header_carries_the_key() -> None:
    state = make_state(ANSWER, api_keys=("sk-a",))
    body = {"model": "scripted", "max_tokens": 5, "messages": HELLO}
    for headers in ({"x-api-key": "sk-a"}, {"authorization": "Bearer sk-a"}):
        assert call(state, "POST", "/v1/messages?beta=true", json=body, headers=headers).status_code == 200


def test_fields_without_effect_are_named() -> None:
    response = send(
        make_state(ANSWER), speed="fast", context_management={"edits": []}, wish="x", inference_geo="eu"
    )
    assert response.headers["x-harmonium-ignored"] == "wish,context_management,speed,inference_geo"
    count = send(make_state(ANSWER), path="/count_tokens", tools=TOOLS)
    assert count.headers["x-harmonium-ignored"] == "max_tokens"


def test_parts_of_a_schema_that_are_not_enforced_are_named_in_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    fields: dict[str, Any] = {"tools": [{"name": "f", "input_schema": schema}]}
    state = make_state(ANSWER)
    whole = message_of(send(state, **fields))
    assert "uniqueItems" in whole["warnings"][0]
    streamed = fold(events_of(send(state, stream=True, **fields)))
    assert without_ids(streamed) == without_ids(whole)


def test_several_calls_are_several_blocks() -> None:
    one = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"n":1}<|call|>'
    script = f"{one}<|start|>assistant{one}<|start|>functions"
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    }
    state = make_state(script)
    whole = message_of(send(state, **fields))
    assert [block["input"] for block in whole["content"]] == [{"n": 1}, {"n": 1}]
    assert len({block["id"] for block in whole["content"]}) == 2
    assert whole["stop_reason"] == "tool_use"
    assert without_ids(fold(events_of(send(state, stream=True, **fields)))) == without_ids(whole)
