from __future__ import annotations

import pytest

from harmonium.errors import RequestError
from harmonium.harmony.grammar_request import read_answer_format, read_input_format, read_tool_choice
from harmonium.harmony.grammar_text import FREE_TEXT, JSON_OBJECT, TextFormat

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}


@pytest.mark.parametrize("value", [None, {"type": "text"}])
def test_text_is_free(value: object) -> None:
    assert read_answer_format(value) == (FREE_TEXT, None)
    assert read_input_format(value) == FREE_TEXT


def test_both_spellings_of_a_schema_mean_the_same_and_keep_the_order_of_properties() -> None:
    nested = read_answer_format(
        {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"},
        }
    )
    flat = read_answer_format(
        {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True, "description": "d"}
    )
    assert nested == flat
    form, told = nested
    assert form == TextFormat("json_schema", '{"type":"object","properties":{"b":{},"a":{}}}', is_strict=True)
    assert told is not None and (told.name, told.schema, told.description) == ("n", SCHEMA, "d")
    assert (
        read_answer_format({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}})[
            0
        ].is_strict
        is False
    )
    assert read_answer_format({"type": "json_object"}) == (JSON_OBJECT, None)


@pytest.mark.parametrize("syntax", ["lark", "regex"])
def test_grammars_are_read_in_both_spellings(syntax: str) -> None:
    flat = {"type": "grammar", "syntax": syntax, "definition": "x"}
    nested = {"type": "grammar", "grammar": {"syntax": syntax, "definition": "x"}}
    for value in (flat, nested):
        assert read_answer_format(value) == (TextFormat(syntax, "x"), None)  # type: ignore[arg-type]
        assert read_input_format(value) == TextFormat(syntax, "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("json", r"response_format is 'json'; expected an object"),
        ({"type": "xml"}, r"response_format.type is 'xml'; expected 'text', 'json_object'"),
        ({"type": "json_schema"}, r"response_format.schema is NoneType; expected a JSON schema"),
        (
            {"type": "json_schema", "json_schema": []},
            r"response_format.json_schema is \[\]; expected an object",
        ),
        (
            {"type": "json_schema", "schema": SCHEMA, "strict": 1},
            r"response_format.strict is 1; expected true",
        ),
        ({"type": "json_schema", "schema": SCHEMA, "name": 1}, r"response_format.name is 1; expected text"),
        ({"type": "grammar", "syntax": "lark"}, r"response_format.definition is None"),
        ({"type": "grammar", "syntax": "bnf", "definition": "x"}, r"response_format.syntax is 'bnf'"),
    ],
)
def test_bad_answer_format_names_the_field(value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_answer_format(value)


def test_bad_input_format_names_the_field() -> None:
    with pytest.raises(RequestError, match=r"tools\[0\].format.type is 'json_object'"):
        read_input_format({"type": "json_object"}, "tools[0].format")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ("auto", None)),
        ("auto", ("auto", None)),
        ("none", ("none", None)),
        ("required", ("required", None)),
        ({"type": "function", "function": {"name": "f"}}, ("required", ("f",))),
        ({"type": "function", "name": "f"}, ("required", ("f",))),
        ({"type": "custom", "custom": {"name": "f"}}, ("required", ("f",))),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
            ("auto", ("f",)),
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}],
            },
            ("required", ("f", "g")),
        ),
    ],
)
def test_tool_choice_is_read_in_both_spellings(value: object, expected: object) -> None:
    assert read_tool_choice(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("any", r"tool_choice is 'any'; expected 'auto', 'none', 'required'"),
        (3, r"tool_choice is 3; expected an object"),
        ({"type": "mcp"}, r"tool_choice.type is 'mcp'"),
        ({"type": "function"}, r"tool_choice.name is None; expected the name of a tool"),
        ({"type": "allowed_tools", "tools": []}, r"tool_choice.tools is \[\]; expected a list"),
        ({"type": "allowed_tools", "mode": "none", "tools": [{"name": "f"}]}, r"tool_choice.mode is 'none'"),
        ({"type": "allowed_tools", "tools": [3]}, r"tool_choice.tools\[0\] is 3; expected an object"),
    ],
)
def test_bad_tool_choice_names_the_field(value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_tool_choice(value)
