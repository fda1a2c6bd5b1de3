"""docs/api.md's tables of fields and events against the schemas and against what the server does."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent

from harmonium.server.body import IGNORED_HEADER, RequestModel
from harmonium.server.chat_schema import ChatCompletionRequest
from harmonium.server.completions_schema import CompletionRequest
from harmonium.server.messages_schema import MessagesRequest
from harmonium.server.responses_schema import ResponsesRequest
from tests.server.client import HELLO, call, make_state
from tests.server.responses_client import PATH, events_of, function

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
CHAT_PATH = "/v1/chat/completions"
MODELS: dict[str, tuple[str, type[RequestModel], dict[str, Any]]] = {
    "Chat Completions": (CHAT_PATH, ChatCompletionRequest, {"messages": HELLO}),
    "Responses": (PATH, ResponsesRequest, {"input": "Hello"}),
    "Completions": ("/v1/completions", CompletionRequest, {"prompt": "Hello"}),
    "Messages": ("/v1/messages", MessagesRequest, {"model": "scripted", "max_tokens": 50, "messages": HELLO}),
}
VALUES: dict[str, Any] = {
    "store": True, "prediction": {"type": "content", "content": "x"}, "verbosity": "low", "ignore_eos": True,
    "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "1h"}, "client_metadata": {"a": "b"},
    "access_programs": ["x"], "background_options": {"a": 1}, "summary": "auto", "generate_summary": "auto",
    "context_management": {"edits": [{"type": "clear"}]}, "inference_geo": "us",
    "diagnostics": {"a": 1}, "audio": {"voice": "x"}, "modalities": ["audio"], "web_search_options": {"a": 1},
    "functions": [{"name": "f"}], "function_call": "auto", "chat_template": "{{ x }}", "documents": ["x"],
    "moderation": {"model": "m"}, "continue_final_message": True, "add_generation_prompt": False,
    "prompt": {"id": "pmpt_1"}, "conversation": "conv_1", "chat_template_kwargs": {"a": 1}, "suffix": "x",
    "prompt_logprobs": 1, "include_stop_str_in_output": True, "best_of": 7, "container": "c",
    "mcp_servers": [{"url": "http://x"}], "thread": {"id": "t"}, "speed": "fast",
}  # fmt: skip
TIERS = {CHAT_PATH: "flex", PATH: "priority", "/v1/messages": "batch"}
NESTED = {"summary": "reasoning", "generate_summary": "reasoning"}


def rows(heading: str) -> dict[str, str]:
    """The table of this heading: first cell -> second."""
    table = PAGE.split(f"\n| {heading} | fields |\n| --- | --- |\n")[1].split("\n\n")[0]
    return {line.split(" | ")[0].strip("| "): line.split(" | ", 1)[1] for line in table.splitlines()}


def fields(cell: str) -> set[str]:
    """Names of fields in a cell."""
    return set(re.findall(r"`([a-z_]+)`", cell))


@pytest.mark.parametrize("heading", MODELS)
def test_every_field_of_a_schema_is_in_its_table(heading: str) -> None:
    known = set(MODELS[heading][1].model_fields)
    named = set().union(*(fields(cell) for cell in rows(heading).values()))
    assert known - named == set()


def cases(row: str) -> list[tuple[str, str]]:
    found = []
    for heading in MODELS:
        names = fields(rows(heading).get(row, ""))
        known = set(MODELS[heading][1].model_fields)
        nested = {name for name in names if name in NESTED and heading == "Responses"}
        found += [(heading, name) for name in sorted((names & known) | nested)]
    return found


def body_with(heading: str, name: str) -> tuple[str, dict[str, Any]]:
    """A path, and a body that sets the field."""
    path, _, body = MODELS[heading]
    value = TIERS[path] if name == "service_tier" else VALUES[name]
    if name in NESTED:
        return path, {**body, NESTED[name]: {name: value}}
    return path, {**body, name: value}


# Named in the row only as what to use in its place.
INSTEAD = {("Responses", "previous_response_id"), ("Responses", "truncation"), ("Completions", "echo"),
           ("Completions", "logprobs"), ("Responses", "text"), ("Responses", "reasoning")}  # fmt: skip


@pytest.mark.parametrize(("heading", "name"), [case for case in cases("refused") if case not in INSTEAD])
def test_refused_field_is_a_400_that_names_it(heading: str, name: str) -> None:
    path, body = body_with(heading, name)
    answer = call(make_state("<|channel|>final<|message|>x<|return|>"), "POST", path, json=body)
    assert answer.status_code == 400, answer.text
    assert name in answer.json()["error"]["message"]


@pytest.mark.parametrize(("heading", "name"), [case for case in cases("no effect") if case not in INSTEAD])
def test_field_without_effect_is_named_in_the_header(heading: str, name: str) -> None:
    path, body = body_with(heading, name)
    answer = call(make_state("<|channel|>final<|message|>x<|return|>"), "POST", path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers[IGNORED_HEADER].split(".")[-1] == name


def event_rows() -> tuple[set[str], list[str]]:
    """(events that come, patterns of those that never do) by the table."""
    table = PAGE.split("| Responses: event | when |\n| --- | --- |\n")[1].split("\n\n")[0]
    sent: set[str] = set()
    never = []
    for line in table.splitlines():
        names = re.findall(r"`(response[a-z_.]+\*?[a-z_.]*)`", line)
        if line.startswith("| never"):
            never += names
        else:
            sent |= set(names)
    return sent - {"response.reasoning.delta", "response.reasoning.done"}, never


def test_events_of_the_table_are_openai_s_and_the_others_never_come() -> None:
    sent, never = event_rows()
    members = typing.get_args(typing.get_args(ResponseStreamEvent)[0])
    official = {typing.get_args(member.model_fields["type"].annotation)[0] for member in members}
    assert sent <= official
    patterns = [re.compile(re.escape(name).replace(r"\*", ".*") + "$") for name in never]
    assert not [name for name in sent if any(pattern.match(name) for pattern in patterns)]
    assert all(any(pattern.match(name) for name in official) for pattern in patterns)


SCRIPTS = [
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
    "<|channel|>commentary to=functions.patch<|message|>text<|call|>",
    "<|channel|>final<|message|>cut",
]


def test_every_event_of_the_table_is_seen_and_no_other() -> None:
    from harmonium.engine import Script, ScriptedEngine
    from harmonium.server import ServerConfig, ServerState
    from tests.scripted_chat import gen

    tools = [function("f"), {"type": "custom", "name": "patch"}]
    broken = ServerState(ServerConfig(), ScriptedEngine([Script(gen("<|channel|>"), error="it broke")]))
    states = [broken, *(make_state(script) for script in SCRIPTS)]
    seen: set[str] = set()
    for state in states:
        for background in (False, True):
            body = {"input": "x", "stream": True, "tools": tools, "background": background}
            answer = call(state, "POST", PATH, json=body)
            seen |= {event["type"] for event in events_of(answer)}
    assert seen == event_rows()[0]
