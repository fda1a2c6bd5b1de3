"""Faults that users report, in other words: variations of what the model writes, the same through both APIs.

test_chat_faults.py and test_responses_faults.py have the reported inputs, tests/test_faults.py the list.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from harmonium.engine import Script, ScriptedEngine
from harmonium.harmony.vocabulary import vocabulary
from harmonium.server import ServerConfig, ServerState
from tests.scripted_chat import gen
from tests.server.chat_stream import fold
from tests.server.client import HELLO, call, chat, chunks_of, engine_of, make_state
from tests.server.responses_client import PATH, function, respond, stream, texts, without_ids

START = "<|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
NAMES = ("f", "g", "write")


class Shown(NamedTuple):
    """What a client sees of a turn; the texts of several messages are joined by line ends."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]


def of_chat(choice: dict[str, Any]) -> Shown:
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return Shown(
        message["content"] or "",
        message.get("reasoning") or "",
        [(call["name"], call["arguments"]) for call in calls],
    )


def of_response(body: dict[str, Any]) -> Shown:
    calls = [item for item in body["output"] if item["type"] == "function_call"]
    return Shown(
        "\n".join(texts(body, "message")),
        "\n".join(texts(body, "reasoning")),
        [(item["name"], item["arguments"]) for item in calls],
    )


class Turn(NamedTuple):
    """shown: the same in both APIs. finish: chat's finish_reason. status: the response's."""

    shown: Shown
    finish: str
    status: str
    diagnostics: list[str]


def turn(tokens: tuple[int, ...], names: tuple[str, ...] = NAMES, **fields: Any) -> Turn:
    """What both APIs make of the tokens, whole and streamed, in events of 1, 4 and 50 tokens."""
    tools = [function(name) for name in names]
    nested = [{"type": "function", "function": {**tool, "type": None}} for tool in tools]
    for tool in nested:
        del tool["function"]["type"]
    found = []
    for size in (1, 4, 50):
        state = ServerState(ServerConfig(), ScriptedEngine([tokens], tokens_per_event=size))
        with_tools = {"tools": nested} if names else {}
        whole = chat(state, **with_tools, **fields).json()["choices"][0]
        streamed, _ = fold(chunks_of(chat(state, stream=True, **with_tools, **fields)))
        assert of_chat(streamed) == of_chat(whole)
        assert streamed["finish_reason"] == whole["finish_reason"]
        body = respond(state, tools=tools)
        events = stream(state, tools=tools)
        assert without_ids(events[-1]["response"]) == without_ids(body)
        codes = [entry["code"] for entry in body["diagnostics"]]
        assert codes == [entry["code"] for entry in whole.get("diagnostics", [])]
        assert state.num_held == 0
        found.append((of_chat(whole), of_response(body), whole["finish_reason"], body["status"], codes))
    assert all(other == found[0] for other in found)
    shown, other_shown, finish, status, codes = found[0]
    if names:
        assert shown == other_shown
    return Turn(shown, finish, status, codes)


HEADERS_OF_F = [
    "<|channel|>commentary to=functions.f<|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.f<|channel|>analysis <|constrain|>json<|message|>",
    "<|channel|>commentary<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.f json<|message|>",
    "<|channel|>commentary to=functions.f <|constrain|>json <|constrain|>json<|message|>",
    "<|channel|>commentary  to=functions.f  <|constrain|> json<|message|>",
    "<|channel|>commentary to=f<|message|>",
    " to=functions.f<|channel|>commentary <|constrain|>json<|message|>",
    " to=functions.f<|channel|>analysis<|message|>",
    "<|channel|>analysis to=functions.f code<|message|>",
]


@pytest.mark.parametrize("header", HEADERS_OF_F)
def test_b01_b16_name_of_a_call_is_clean_wherever_the_recipient_stands(header: str) -> None:
    found = turn(gen(f'{header}{{"q":1}}<|call|>'))
    assert found.shown == Shown("", "", [("f", '{"q":1}')])
    assert (found.finish, found.status) == ("tool_calls", "completed")


@pytest.mark.parametrize("header", HEADERS_OF_F)
def test_b01_b02_call_is_replayed_with_a_clean_name(header: str) -> None:
    state = make_state(f'{header}{{"q":1}}<|call|>', f"{FINAL}ok<|return|>")
    tools = [{"type": "function", "function": {"name": "f"}}]
    message = chat(state, tools=tools).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "42"}
    assert chat(state, [*HELLO, message, result], tools=tools).status_code == 200
    ids = engine_of(state).requests[-1].token_ids
    text = vocabulary().decode(ids)
    assert (
        f'{START}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"q":1}}<|call|>' in text
    )
    assert ids.count(200003) == 1 and ids[ids.index(200003) - 1] == vocabulary().encode(" ")[0]


@pytest.mark.parametrize(
    "junction",
    [
        "<|start|><|start|>assistant",
        "<|start|>assistant<|start|>assistant",
        "<|start|>assistant assistant",
        "<|start|>assistantassistantassistant",
        "<|start|>",
        "<|start|>Assistant",
        "",
    ],
)
def test_b03_strange_role_before_a_final_costs_nothing(junction: str) -> None:
    found = turn(gen(f"{ANALYSIS}x<|end|>{junction}{FINAL}hi<|return|>"))
    assert found.shown == Shown("hi", "x", [])
    assert (found.finish, found.status) == ("stop", "completed")


@pytest.mark.parametrize(
    "author", ["bash", "user", "system", "functions.f", "functions.f to=assistant", "tool"]
)
def test_b03_b27_words_of_somebody_else_are_no_answer_and_no_call(author: str) -> None:
    script = f"{ANALYSIS}x<|end|><|start|>{author}<|channel|>commentary<|message|>22C<|end|>"
    found = turn(gen(f"{script}{START}{FINAL}hi<|return|>"))
    assert found.shown.calls == []
    assert found.shown.content == "hi"
    assert found.diagnostics


@pytest.mark.parametrize("text", ["Sorry, no.", "analysis", "Must refuse. Final answer:", "🙂"])
def test_b05_text_without_a_channel_is_reasoning_and_never_lost(text: str) -> None:
    alone = turn(gen(f"{text}<|return|>"))
    assert (alone.shown.content, alone.shown.calls) == ("", [])
    assert alone.diagnostics
    before = turn(gen(f"{text}<|end|>{START}{FINAL}Sorry.<|return|>"))
    assert before.shown.content == "Sorry."
    assert before.finish == "stop"


@pytest.mark.parametrize(
    "script",
    [
        "", "<|return|>", "<|call|>", "<|end|>", "<|end|><|return|>", "<|channel|><|return|>",
        "<|start|><|return|>", "<|channel|>final<|return|>", "<|message|><|return|>", "<|constrain|><|call|>",
        "<|endoftext|>",
        f"{START}<|return|>", "<|channel|>commentary to=functions.f<|call|>", "<|channel|>commentary<|call|>",
    ],
)  # fmt: skip
def test_b06_b14_turn_that_says_nothing_is_an_answer_that_says_so(script: str) -> None:
    found = turn(gen(script))
    assert found.shown.content == ""
    assert found.finish in ("stop", "length", "tool_calls")
    assert found.finish != "stop" or found.diagnostics, "a silent stop with nothing"
    if found.finish == "tool_calls":
        assert found.shown.calls


@pytest.mark.parametrize(
    "after", ["comment", "<|call|>", f"{START}{FINAL}22C<|return|>", "<|end|>", f"{CALL}{{}}<|call|>"]
)
@pytest.mark.parametrize("stops", [None, [200007], [199999], [13]])
def test_b07_nothing_counts_after_a_call_whatever_stops_the_client_adds(after: str, stops: Any) -> None:
    state = make_state(f"{CALL}{{}}<|call|>{after}")
    fields = {"tools": [{"type": "function", "function": {"name": "f"}}], "stop_token_ids": stops}
    choice = chat(state, **fields).json()["choices"][0]
    assert of_chat(choice) == Shown("", "", [("f", "{}")])
    assert choice["finish_reason"] == "tool_calls"
    asked = set(engine_of(state).requests[-1].stop_token_ids)
    assert {200002, 200012, *(stops or ())} <= asked


@pytest.mark.parametrize(
    "header", ["??", "commentary?commentary?", "fin", "", "analysis analysis", "🙂", "x" * 300]
)
def test_b09_garbage_header_costs_nothing_that_follows(header: str) -> None:
    rest = f"{START}{ANALYSIS}a<|end|>{START}{FINAL}b<|return|>"
    found = turn(gen(f"<|channel|>{header}<|end|>{rest}"))
    assert found.shown.content == "b"
    assert found.shown.reasoning.endswith("a")
    assert found.finish == "stop"


@pytest.mark.parametrize("preambles", [["One."], ["One.", "Two."], ["Één\n\n1. 🙂"]])
@pytest.mark.parametrize("thought", ["", "hm"])
def test_b10_b25_preambles_are_content_and_the_call_is_a_call(preambles: list[str], thought: str) -> None:
    parts = [f"{ANALYSIS}{thought}<|end|>{START}"] if thought else []
    parts += [f"<|channel|>commentary<|message|>{text}<|end|>{START}" for text in preambles]
    found = turn(gen("".join(parts) + f'{CALL}{{"a":1}}<|call|>'))
    assert found.shown == Shown("\n".join(preambles), thought, [("f", '{"a":1}')])
    assert found.finish == "tool_calls"


def test_b11_reasoning_after_a_final_is_still_reasoning() -> None:
    script = f"{FINAL}1<|end|>{START}{ANALYSIS}2<|end|>{START}{FINAL}3<|end|>{START}{CALL}{{}}<|call|>"
    found = turn(gen(script))
    assert found.shown == Shown("1\n3", "2", [("f", "{}")])


LONG = gen(
    f"{ANALYSIS}think 🙂é<|end|>{START}<|channel|>commentary<|message|>I look.<|end|>{START}"
    f'{CALL}{{"a":{{"b":"🙂"}}}}<|call|>'
)


@pytest.mark.parametrize("length", range(1, len(LONG)))
def test_b14_b18_b67_cut_at_any_token_is_length_and_keeps_what_there_is(length: int) -> None:
    found = turn(LONG[:length])
    assert (found.finish, found.status) == ("length", "incomplete")
    shown = found.shown
    clean = shown.reasoning.rstrip("\ufffd")
    assert "think 🙂é".startswith(clean)
    assert "I look.".startswith(shown.content)
    assert len(shown.calls) <= 1
    if shown.calls:
        name, arguments = shown.calls[0]
        assert name == "f" and '{"a":{"b":"🙂"}}'.startswith(arguments.rstrip("\ufffd"))


@pytest.mark.parametrize(
    "arguments",
    [
        "ls -R\n", '{"path":"a.py","content":"x"}}', '{"a":', "null", "[1]", '"text"', "", "  ", "{}{}",
        '{"content":"/** {\\"k\\": [1]} */\\n]"}', "{'a': 1}", '{"a": NaN}', "<xml/>", "🙂",
        '{"a": "\\ud800"}', "x" * 5000,
    ],
)  # fmt: skip
def test_b19_arguments_come_as_they_were_written(arguments: str) -> None:
    header = "<|channel|>commentary to=functions.write <|constrain|>json<|message|>"
    found = turn(gen(f"{header}{arguments}<|call|>"))
    assert found.shown.calls == [("write", arguments)]
    assert found.finish == "tool_calls"


@pytest.mark.parametrize(
    "recipient", ["python", "browser.open", "container.exec", "functions.f", "nobody", "user"]
)
def test_b21_tool_that_nobody_offered_is_never_finish_tool_calls(recipient: str) -> None:
    found = turn(gen(f"<|channel|>commentary to={recipient} code<|message|>1+1<|call|>"), names=())
    assert found.shown.calls == []
    assert found.finish == "stop"
    assert found.diagnostics


@pytest.mark.parametrize(
    "text",
    [
        "analysisWe think.assistantfinalHi", "<|channel|>final<|message|>x<|return|>", "<|end|>",
        "assistantfinal", "<|start|>assistant<|call|>", "commentary to=functions.f {}", "\n<|message|>\n",
        "<|reserved_200013|>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("channel", ["analysis", "final"])
def test_b23_special_words_as_plain_text_are_text(text: str, channel: str) -> None:
    tokens = (*gen(f"<|channel|>{channel}<|message|>"), *vocabulary().encode(text))
    found = turn((*tokens, 200007, *gen(f"{START}{FINAL}."), 200002))
    if channel == "final":
        assert found.shown == Shown(f"{text}\n.", "", [])
    else:
        assert found.shown == Shown(".", text, [])
    assert not found.diagnostics


USAGE_SCRIPTS = [
    f"{ANALYSIS}one two three<|end|>{START}{FINAL}Hi there<|return|>",
    f"{FINAL}Hi<|return|>",
    f"{ANALYSIS}a<|end|>{START}{ANALYSIS}b<|end|>{START}{CALL}{{}}<|call|>",
    f"{ANALYSIS}cut",
]


@pytest.mark.parametrize("script", USAGE_SCRIPTS)
def test_b65_usage_is_the_same_in_every_api(script: str) -> None:
    state = make_state(script)
    usage = chat(state).json()["usage"]
    _, streamed = fold(chunks_of(chat(state, stream=True, stream_options={"include_usage": True})))
    body = respond(state)["usage"]
    event = stream(state)[-1]["response"]["usage"]
    message = call(
        state, "POST", "/v1/messages", json={"model": "scripted", "max_tokens": 500, "messages": HELLO}
    ).json()["usage"]
    assert usage == streamed
    assert body == event
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == body["input_tokens"] == message["input_tokens"]
    assert usage["completion_tokens"] == body["output_tokens"] == len(gen(script)) == message["output_tokens"]
    thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert body["output_tokens_details"]["reasoning_tokens"] == thought
    cached = (usage["prompt_tokens_details"], body["input_tokens_details"])
    assert [details["cached_tokens"] for details in cached] == [0, 0]


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": HELLO, "model": "gpt-4"}),
        ("/v1/completions", {"prompt": [[200_000_000]]}),
        (PATH, {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}),
        (PATH, {"input": "x", "previous_response_id": "resp_none"}),
        (PATH, {"input": "a " * 140_000}),
        ("/v1/messages", {"model": "scripted", "max_tokens": 0, "messages": HELLO}),
    ],
)
def test_b66_bad_request_is_never_a_200(path: str, body: dict[str, Any], is_streamed: bool) -> None:
    answer = call(make_state(f"{FINAL}x<|return|>"), "POST", path, json={**body, "stream": is_streamed})
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", PATH, "/v1/messages"])
@pytest.mark.parametrize("script", [f"{FINAL}half", f"{ANALYSIS}half", CALL, "<|channel|>"])
def test_b20_b63_b66_failure_is_a_500_or_the_last_event_of_a_stream(path: str, script: str) -> None:
    engine = ScriptedEngine([Script(gen(script), error="the step failed")])
    state = ServerState(ServerConfig(), engine)
    body = {"model": "scripted", "messages": HELLO, "input": "x", "prompt": "x", "max_tokens": 50}
    used = {"/v1/completions": ("prompt",), PATH: ("input",)}.get(path, ("messages", "max_tokens", "model"))
    body = {name: body[name] for name in used}
    whole = call(state, "POST", path, json=body)
    assert whole.status_code == 500
    assert whole.json()["error"]["message"] == "the step failed"
    streamed = call(state, "POST", path, json={**body, "stream": True})
    blocks = [block for block in streamed.text.split("\n\n") if block and not block.startswith(":")]
    last = json.loads(blocks[-1].split("data: ", 1)[1])
    error = last["response"]["error"] if path == PATH else last["error"]
    assert error["message"] == "the step failed"
    assert sum("the step failed" in block for block in blocks) == 1
    assert state.num_held == 0
