"""`tools` and `tool_choice` of a Messages request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harmonium.errors import ApiError
from harmonium.harmony.grammar import ToolChoice
from harmonium.harmony.messages import Tool
from harmonium.server.config import Limits
from harmonium.server.errors import wrong_value
from harmonium.server.messages_schema import PromptFields
from harmonium.server.tool_input import read_tools
from harmonium.server.turn_rules import MAX_PARALLEL_CALLS


@dataclass(frozen=True, slots=True)
class ToolRules:
    """Tools, and which of them the model may or must call. Fields are those of TurnRules.

    max_calls: MAX_PARALLEL_CALLS with `disable_parallel_tool_use: false`, else one, as the models do.
    """

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = "auto"
    allowed: tuple[str, ...] | None = None
    max_calls: int = 1
    strict: frozenset[str] = frozenset()


def read_tool_rules(body: PromptFields, limits: Limits) -> ToolRules:
    """Raises ApiError for a tool that cannot be offered or a choice that cannot be kept; HarmonyError."""
    given = body.tools or []
    tools = read_tools([_as_function(f"tools[{index}]", tool) for index, tool in enumerate(given)], limits)
    choice, allowed = _choice(body.tool_choice or {"type": "auto"}, tools)
    is_one_call = (body.tool_choice or {}).get("disable_parallel_tool_use")
    if is_one_call not in (None, True, False):
        raise wrong_value("tool_choice.disable_parallel_tool_use", is_one_call, "true or false")
    return ToolRules(
        tools,
        choice,
        allowed,
        max_calls=MAX_PARALLEL_CALLS if is_one_call is False else 1,
        strict=frozenset(tool["name"] for tool in given if tool.get("strict")),
    )


def _choice(given: Mapping[str, Any], tools: tuple[Tool, ...]) -> tuple[ToolChoice, tuple[str, ...] | None]:
    names = [tool.name for tool in tools]
    match given.get("type"):
        case "auto":
            return "auto", None
        case "none":
            return "none", None
        case "any":
            if not names:
                raise ApiError("tool_choice.type is 'any' and tools is empty", param="tool_choice")
            return "required", None
        case "tool":
            name = given.get("name")
            if name not in names:
                raise wrong_value("tool_choice.name", name, f"one of the tools: {', '.join(names) or 'none'}")
            return "required", (str(name),)
    raise wrong_value("tool_choice.type", given.get("type"), "auto, any, tool or none")


def _as_function(where: str, tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tool as Chat Completions has it. Raises ApiError."""
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise ApiError(
            f"{where}.type is {str(kind)[:60]!r}; expected 'custom': this server runs no tools, and the "
            "models know none but those that come with an input_schema",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    schema, strict = tool.get("input_schema"), tool.get("strict")
    if not isinstance(schema, Mapping):
        raise wrong_value(f"{where}.input_schema", schema, "a JSON schema (an object)")
    if schema.get("type") != "object":
        raise wrong_value(f"{where}.input_schema.type", schema.get("type"), '"object"')
    if strict not in (None, True, False):
        raise wrong_value(f"{where}.strict", strict, "true or false")
    return {"name": tool.get("name"), "description": _description(where, tool), "parameters": schema}


def _description(where: str, tool: Mapping[str, Any]) -> str:
    text, examples = tool.get("description"), tool.get("input_examples") or []
    if text is not None and not isinstance(text, str):
        raise wrong_value(f"{where}.description", text, "text")
    if not isinstance(examples, list):
        raise wrong_value(f"{where}.input_examples", examples, "a list of objects")
    lines = [text] if text else []
    if examples:
        lines.append("Examples of its input:")
        lines += [json.dumps(example, ensure_ascii=False, separators=(",", ":")) for example in examples]
    return "\n".join(lines)
