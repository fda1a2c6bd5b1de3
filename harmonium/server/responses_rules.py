"""What a response asks its turn to keep to -> the grammar's rules."""

from __future__ import annotations

from harmonium.errors import ApiError
from harmonium.harmony.grammar import TurnRules
from harmonium.harmony.grammar_request import read_answer_format, read_input_format
from harmonium.server.config import ServerConfig
from harmonium.server.responses_object import format_object
from harmonium.server.responses_schema import ResponsesRequest
from harmonium.server.responses_tools import ToolChoice, ToolTable
from harmonium.server.turn_rules import MAX_PARALLEL_CALLS


def response_rules(
    body: ResponsesRequest, tools: ToolTable, choice: ToolChoice, config: ServerConfig
) -> tuple[TurnRules | None, list[str]]:
    """The rules, and warnings of what is not held. None where the grammar is off, by the server's options or
    by `use_grammar: false`.

    Raises RequestError for formats that cannot be read; ApiError for a choice of tools, a format of the
    answer or a budget, which only the grammar could hold, when it is off.
    """
    answer, _ = read_answer_format(format_object(body.format), "text.format")
    rules = TurnRules(
        tool_choice=choice.mode,
        allowed_tools=choice.allowed,
        max_calls=_max_calls(body),
        answer=answer,
        inputs={
            entry.declared: read_input_format(entry.format, f"format of tool {entry.declared!r}")
            for entry in tools.entries
            if entry.kind == "custom"
        },
        strict_tools=frozenset(entry.declared for entry in tools.entries if entry.is_strict),
        max_reasoning_tokens=body.reasoning.max_tokens if body.reasoning is not None else None,
    )
    if config.uses_grammar and body.use_grammar is not False:
        return rules, []
    _check_without_grammar(rules)
    return None, _not_held(rules)


def _max_calls(body: ResponsesRequest) -> int:
    if not body.parallel_tool_calls:
        return 1
    return min(MAX_PARALLEL_CALLS, body.max_tool_calls or MAX_PARALLEL_CALLS)


def _check_without_grammar(rules: TurnRules) -> None:
    needs = {
        "tool_choice": rules.tool_choice == "required" or rules.allowed_tools is not None,
        "text.format": rules.answer.kind != "text",
        "reasoning.max_tokens": rules.max_reasoning_tokens is not None,
    }
    for name, is_needed in needs.items():
        if is_needed:
            raise ApiError(
                f"{name} cannot be held to: the grammar is off", param=name, code="unsupported_parameter"
            )


def _not_held(rules: TurnRules) -> list[str]:
    """What clients such as Codex always ask for, and what a turn is useful without."""
    tools = [*rules.strict_tools, *(name for name, form in rules.inputs.items() if form.kind != "text")]
    notes = [
        f"the grammar is off: what tool {name!r} is given is not held to its schema" for name in sorted(tools)
    ]
    if rules.max_calls > 1:
        notes.append("the grammar is off: a turn makes one call, for several need it")
    return notes
