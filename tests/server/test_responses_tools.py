"""Tools of a request: functions, custom tools, namespaces, and types that do not run here."""

from __future__ import annotations

from typing import Any

import pytest

from harmonium.errors import RequestError
from harmonium.server.responses_tools import ToolChoice, read_tool_choice, read_tools
from tests.server.client import make_state, prompt_text
from tests.server.responses_client import function, respond, stream, texts

PATCH = "*** Begin Patch\n*** Add File: a\n+x\n*** End Patch"
GRAMMAR = 'start: "*** Begin Patch" LF line+ "*** End Patch"\nline: /[^\\n]+/ LF\n%import common.LF\n'
CODEX_TOOLS: list[dict[str, Any]] = [
    function("exec_command", cmd={"type": "string"}),
    {
        "type": "namespace",
        "name": "files",
        "description": "Files.",
        "tools": [function("read"), function("write")],
    },
    {"type": "web_search", "external_web_access": False},
    {"type": "local_shell"},
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Edits files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": GRAMMAR},
    },
]


def _custom(text: str, name: str = "note") -> str:
    return f"<|channel|>commentary to=functions.{name}<|message|>{text}<|call|>"


def test_tools_of_codex_are_declared_flattened_or_left_out() -> None:
    table = read_tools(CODEX_TOOLS)
    assert [entry.declared for entry in table.entries] == [
        "exec_command",
        "files__read",
        "files__write",
        "apply_patch",
    ]
    assert table.skipped == ("web_search", "local_shell")
    state = make_state("<|channel|>final<|message|>ok<|return|>")
    body = respond(state, tools=CODEX_TOOLS, parallel_tool_calls=True)
    assert body["tools"][2:4] == CODEX_TOOLS[2:4]
    assert [warning for warning in body["warnings"] if "web_search" in warning]
    prompt = prompt_text(state)
    assert "type files__read = " in prompt
    assert "type apply_patch = (_: string) => any;" in prompt
    assert 'start: "*** Begin Patch" LF line+' in prompt


def test_call_in_a_namespace_comes_back_with_name_and_namespace() -> None:
    text = "<|channel|>commentary to=functions.files__read <|constrain|>json<|message|>{}<|call|>"
    (item,) = respond(make_state(text), tools=CODEX_TOOLS)["output"]
    assert (item["name"], item["namespace"], item["status"]) == ("read", "files", "completed")


def test_custom_call_carries_its_text_unchanged() -> None:
    events = stream(make_state(_custom(PATCH, "apply_patch")), tools=CODEX_TOOLS)
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", PATCH)
    assert len([event for event in events if event["type"].endswith("input.delta")]) > 3


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('"a b"', "a b"),
        ('{"other": "x"}', '{"other": "x"}'),
        ('{"input": 5}', '{"input": 5}'),
        ("{not json", "{not json"),
        ('  {"input": "x"}', "x"),
        ("plain {text}", "plain {text}"),
        ("", ""),
    ],
)
def test_free_text_that_the_model_wrapped_as_json_is_unwrapped(written: str, meant: str) -> None:
    tools = [{"type": "custom", "name": "note"}]
    state = make_state(_custom(written))
    assert texts(stream(state, tools=tools)[-1]["response"], "custom_tool_call") == [meant]
    assert texts(respond(state, tools=tools), "custom_tool_call") == [meant]


def test_text_under_a_grammar_is_never_unwrapped() -> None:
    form = {"type": "grammar", "syntax": "regex", "definition": ".*"}
    tools = [{"type": "custom", "name": "note", "format": form}]
    body = respond(make_state(_custom('{"input": "x"}')), tools=tools)
    assert texts(body, "custom_tool_call") == ['{"input": "x"}']


def test_nested_function_of_chat_completions_is_understood() -> None:
    nested = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    table = read_tools([nested])
    assert (table.entries[0].name, table.entries[0].is_strict) == ("f", True)
    assert table.echo[0]["name"] == "f"


@pytest.mark.parametrize(
    ("tool", "place"),
    [
        ({"type": "teleport"}, r"tools\[0\]\.type"),
        ({"type": 5}, r"tools\[0\]\.type"),
        ({"type": "function"}, r"tools\[0\]\.name"),
        ({"type": "function", "name": "x" * 129}, r"tools\[0\]\.name"),
        ({"type": "function", "name": "f", "parameters": []}, r"tools\[0\]\.parameters"),
        ({"type": "function", "name": "f", "description": 1}, r"tools\[0\]\.description"),
        ({"type": "custom", "name": "f", "format": {"type": "xml"}}, r"tools\[0\]\.format\.type"),
        ({"type": "custom", "name": "f", "format": {"type": "grammar", "syntax": "ebnf"}}, "syntax"),
        ({"type": "custom", "name": "f", "format": {"type": "grammar", "syntax": "lark"}}, "definition"),
        ({"type": "namespace", "name": "n"}, r"tools\[0\]\.tools"),
        ({"type": "namespace", "tools": []}, r"tools\[0\]\.name"),
        ({"type": "namespace", "name": "n", "tools": [{"type": "web_search"}]}, r"tools\[0\]\.tools\[0\]"),
    ],
)
def test_tool_that_cannot_be_read_is_named(tool: dict[str, Any], place: str) -> None:
    with pytest.raises(RequestError, match=place):
        read_tools([tool])


def test_names_must_differ_also_across_namespaces() -> None:
    twice = [{"type": "namespace", "name": "a", "tools": [function("b")]}, function("a__b")]
    with pytest.raises(RequestError, match="a__b"):
        read_tools(twice)


@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "exec_command"}, ToolChoice("required", ("exec_command",))),
        (
            {"type": "function", "function": {"name": "exec_command"}},
            ToolChoice("required", ("exec_command",)),
        ),
        (
            {"type": "function", "name": "read", "namespace": "files"},
            ToolChoice("required", ("files__read",)),
        ),
        ({"type": "custom", "name": "apply_patch"}, ToolChoice("required", ("apply_patch",))),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "exec_command"}] * 2,
            },
            ToolChoice("auto", ("exec_command",)),
        ),
    ],
)
def test_tool_choice_is_read_in_all_its_forms(choice: Any, meaning: ToolChoice) -> None:
    assert read_tool_choice(choice, read_tools(CODEX_TOOLS)) == meaning


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "nobody"},
        {"type": "function"},
        {"type": "web_search"},
        {},
        {"type": "allowed_tools", "tools": []},
        {
            "type": "allowed_tools",
            "mode": "sometimes",
            "tools": [{"type": "function", "name": "exec_command"}],
        },
        {"type": "allowed_tools", "allowed_tools": 5},
    ],
)
def test_choice_of_what_is_not_offered_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="tool_choice"):
        read_tool_choice(choice, read_tools(CODEX_TOOLS))
