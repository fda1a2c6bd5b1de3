"""Response formats, tool choices and input formats as OpenAI's APIs spell them -> the rules of a turn.

Chat Completions nests what Responses has flat ({"type": "json_schema", "json_schema": {"schema": ...}} and
{"type": "json_schema", "schema": ...}); both are read everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harmonium.errors import RequestError
from harmonium.harmony.grammar import ToolChoice
from harmonium.harmony.grammar_text import FREE_TEXT, JSON_OBJECT, TextFormat, json_schema_format
from harmonium.harmony.messages import ResponseFormat


def read_answer_format(
    value: object, name: str = "response_format"
) -> tuple[TextFormat, ResponseFormat | None]:
    """What the final answer must be, and what of it the model is to be told in its prompt.

    value: {"type": "text" | "json_object" | "json_schema" | "grammar", ...} or None. "grammar" is our
    extension: with "syntax" ("lark" or "regex") and "definition", as custom tools have it. name: in errors.

    Raises RequestError, naming the field, for anything else.
    """
    if value is None:
        return FREE_TEXT, None
    fields = _object(value, name)
    match fields.get("type"):
        case "text":
            return FREE_TEXT, None
        case "json_object":
            return JSON_OBJECT, None
        case "json_schema":
            return _schema_format(fields, name)
        case "grammar":
            return _grammar_format(fields, name), None
        case other:
            raise RequestError(
                f"{name}.type is {other!r}; expected 'text', 'json_object', 'json_schema' or 'grammar'"
            )


def read_input_format(value: object, name: str = "format") -> TextFormat:
    """The input of a custom tool: {"type": "text"}, {"type": "grammar", ...} or None. Raises RequestError."""
    if value is None:
        return FREE_TEXT
    fields = _object(value, name)
    match fields.get("type"):
        case "text":
            return FREE_TEXT
        case "grammar":
            return _grammar_format(fields, name)
        case other:
            raise RequestError(f"{name}.type is {other!r}; expected 'text' or 'grammar'")


def read_tool_choice(value: object, name: str = "tool_choice") -> tuple[ToolChoice, tuple[str, ...] | None]:
    """(tool_choice, allowed_tools) of TurnRules.

    value: None, "auto", "none", "required", a named function or custom tool, or {"type": "allowed_tools"}
    with "mode" and "tools". Raises RequestError, naming the field.
    """
    if value is None:
        return "auto", None
    if isinstance(value, str):
        return _mode(value, ("auto", "none", "required"), name), None
    fields = _object(value, name)
    match fields.get("type"):
        case "function" | "custom":
            return "required", (_tool_name(fields, name),)
        case "allowed_tools":
            inner = _nested(fields, "allowed_tools", name)
            mode = _mode(inner.get("mode", "auto"), ("auto", "required"), f"{name}.mode")
            tools = inner.get("tools")
            if not isinstance(tools, (list, tuple)) or not tools:
                raise RequestError(f"{name}.tools is {tools!r}; expected a list of tools")
            named = (
                _tool_name(_object(tool, f"{name}.tools[{index}]"), f"{name}.tools[{index}]")
                for index, tool in enumerate(tools)
            )
            return mode, tuple(dict.fromkeys(named))
        case other:
            raise RequestError(f"{name}.type is {other!r}; expected 'function', 'custom' or 'allowed_tools'")


def _schema_format(fields: Mapping[str, Any], name: str) -> tuple[TextFormat, ResponseFormat]:
    inner = _nested(fields, "json_schema", name)
    schema = inner.get("schema")
    if not isinstance(schema, Mapping):
        raise RequestError(f"{name}.schema is {type(schema).__name__}; expected a JSON schema (an object)")
    strict, title, description = (inner.get(key) for key in ("strict", "name", "description"))
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{name}.strict is {strict!r}; expected true or false")
    for key, text in (("name", title), ("description", description)):
        if text is not None and not isinstance(text, str):
            raise RequestError(f"{name}.{key} is {text!r}; expected text")
    form = json_schema_format(schema, f"{name}.schema", is_strict=bool(strict))
    return form, ResponseFormat(title or "response", schema, description or "")


def _grammar_format(fields: Mapping[str, Any], name: str) -> TextFormat:
    inner = _nested(fields, "grammar", name)
    syntax, definition = inner.get("syntax"), inner.get("definition")
    if not isinstance(definition, str) or not definition:
        raise RequestError(f"{name}.definition is {definition!r}; expected a grammar or regular expression")
    if syntax == "lark":
        return TextFormat("lark", definition)
    if syntax == "regex":
        return TextFormat("regex", definition)
    raise RequestError(f"{name}.syntax is {syntax!r}; expected 'lark' or 'regex'")


def _tool_name(fields: Mapping[str, Any], where: str) -> str:
    inner = fields
    for key in ("function", "custom"):
        inner = _nested(inner, key, where)
    name = inner.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name is {name!r}; expected the name of a tool")
    return name


def _mode(value: object, expected: tuple[ToolChoice, ...], where: str) -> ToolChoice:
    for mode in expected:
        if value == mode:
            return mode
    raise RequestError(f"{where} is {value!r}; expected {', '.join(map(repr, expected))}")


def _nested(fields: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """fields[key] where that is there, else the fields themselves."""
    return _object(fields[key], f"{where}.{key}") if key in fields else fields


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} is {value!r}; expected an object")
    return value
