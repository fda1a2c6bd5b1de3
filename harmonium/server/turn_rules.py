"""What a chat completion asks its turn to keep to -> the grammar's rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harmonium.errors import ApiError
from harmonium.harmony.grammar import TurnRules
from harmonium.harmony.grammar_request import read_answer_format, read_input_format, read_tool_choice
from harmonium.harmony.grammar_text import TextFormat
from harmonium.server.chat_schema import ChatCompletionRequest
from harmonium.server.config import ServerConfig
from harmonium.server.tool_input import custom_fields

MAX_PARALLEL_CALLS = 16
"""Calls of a turn when the request says `parallel_tool_calls: true`; it makes one otherwise."""


def turn_rules(body: ChatCompletionRequest, config: ServerConfig) -> TurnRules | None:
    """The rules; None where the grammar is off, by the server's options or by `use_grammar: false`.

    Raises RequestError for what cannot be read, ApiError for what only the grammar could hold when it is off.
    """
    tool_choice, allowed = read_tool_choice(body.tool_choice)
    if tool_choice != "auto" and tool_choice != "none" and not body.tools:
        raise ApiError(f"tool_choice is {tool_choice!r} and tools is empty", param="tool_choice")
    answer, _ = read_answer_format(body.response_format)
    budget = body.reasoning.max_tokens if body.reasoning is not None else None
    rules = TurnRules(
        tool_choice=tool_choice,
        allowed_tools=allowed,
        max_calls=MAX_PARALLEL_CALLS if body.parallel_tool_calls else 1,
        answer=answer,
        inputs=_input_formats(body),
        strict_tools=frozenset(name for name, is_strict in _functions(body) if is_strict),
        max_reasoning_tokens=budget,
    )
    if config.uses_grammar and body.use_grammar is not False:
        return rules
    _check_without_grammar(rules)
    return None


def _input_formats(body: ChatCompletionRequest) -> Mapping[str, TextFormat]:
    formats: dict[str, TextFormat] = {}
    for index, tool in enumerate(body.tools or ()):
        if tool.get("type") == "custom":
            fields = custom_fields(tool)
            formats[fields["name"]] = read_input_format(fields.get("format"), f"tools[{index}].custom.format")
    return formats


def _functions(body: ChatCompletionRequest) -> list[tuple[str, bool]]:
    """(name, whether its schema is strict) of each function."""
    found: list[tuple[str, bool]] = []
    for index, tool in enumerate(body.tools or ()):
        fields: Any = tool.get("function", tool)
        strict = fields.get("strict")
        if strict is not None and not isinstance(strict, bool):
            where = f"tools[{index}].function.strict"
            raise ApiError(f"{where} is no true or false", param=where)
        if tool.get("type", "function") == "function":
            found.append((fields["name"], bool(strict)))
    return found


def _check_without_grammar(rules: TurnRules) -> None:
    needs = {
        "tool_choice": rules.tool_choice not in ("auto", "none") or rules.allowed_tools is not None,
        "response_format": rules.answer.kind != "text",
        "reasoning.max_tokens": rules.max_reasoning_tokens is not None,
        "parallel_tool_calls": rules.max_calls > 1,
        "tools": bool(rules.strict_tools) or any(form.kind != "text" for form in rules.inputs.values()),
    }
    for name, is_needed in needs.items():
        if is_needed:
            raise ApiError(
                f"{name} cannot be held to: the grammar is off", param=name, code="unsupported_parameter"
            )
