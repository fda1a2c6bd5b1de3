"""A grammar for the whole turn of the assistant, from behind `<|start|>assistant` to <|return|> or <|call|>.

    turn = compile_turn(TurnRules(tool_choice="required"), conversation.tools)
    state = turn.start()
    while not state.is_complete:
        state.advance(choose(logits, state.mask()))

Headers are those that the model was trained to write, recipients are tools that were offered, arguments and
final answers follow their schemas, reasoning is free text. docs/grammar.md says what holds and what does not.
The state is what an engine wants of a constraint; this room knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from harmonium.errors import RequestError
from harmonium.harmony.grammar_compile import GrammarLimits, GrammarWarning, compile_texts
from harmonium.harmony.grammar_header import (
    Callee,
    add_call_headers,
    call_body,
    callees,
    final_body,
    message_headers,
)
from harmonium.harmony.grammar_state import Course, TurnState
from harmonium.harmony.grammar_text import FREE_TEXT, TextFormat, arguments_format
from harmonium.harmony.messages import Tool, ToolNamespace
from harmonium.harmony.vocabulary import RETURN, STOP_TOKEN_IDS, vocabulary

ToolChoice = Literal["auto", "none", "required"]

MAX_CALLS = 64
"""Most calls of a turn that a request may ask for."""

_ANSWER = "the response format"


@dataclass(frozen=True, slots=True)
class TurnRules:
    """What a turn has to keep to, beside the tools that were offered.

    tool_choice: "none": no call; "required": a call, no final answer. allowed_tools: names of those that may
    be called (one: a named choice), None: all. max_calls: calls in the turn. answer: format of the final
    answer. inputs: formats of tools that take text rather than JSON, by name; a tool whose parameters are
    {"type": "string"}, as custom tools are declared in prompts, takes free text without being named.
    strict_tools: those whose schema must be enforced whole, or the request is refused. allows_reasoning,
    max_reasoning_tokens: when the tokens are spent, reasoning is closed; 0 is no reasoning.

    Raises RequestError for a number out of range.
    """

    tool_choice: ToolChoice = "auto"
    allowed_tools: tuple[str, ...] | None = None
    max_calls: int = 1
    answer: TextFormat = FREE_TEXT
    inputs: Mapping[str, TextFormat] = field(default_factory=dict)
    strict_tools: frozenset[str] = frozenset()
    allows_reasoning: bool = True
    max_reasoning_tokens: int | None = None

    def __post_init__(self) -> None:
        if not _is_whole(self.max_calls) or not 1 <= self.max_calls <= MAX_CALLS:
            raise RequestError(f"max_calls is {self.max_calls!r}; expected 1 to {MAX_CALLS}")
        budget = self.max_reasoning_tokens
        if budget is not None and (not _is_whole(budget) or budget < 0):
            raise RequestError(f"max_reasoning_tokens is {budget!r}; expected a whole number from 0")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Origin = tuple[TurnRules, tuple[Tool, ...], tuple[ToolNamespace, ...], "GrammarLimits | None"]
"""The arguments of `compile_turn`."""


@dataclass(frozen=True, slots=True)
class CompiledTurn:
    """A turn's grammar, for any number of turns at once. warnings: what it does not enforce.

    stop_token_ids: the tokens after which nothing may follow; with several calls <|call|> is none of them.
    origin: what it was compiled from, which is all that a pickle holds; unpickled it is a `PackedTurn`.
    """

    course: Course
    warnings: tuple[GrammarWarning, ...]
    origin: Origin

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return STOP_TOKEN_IDS if self.course.max_calls <= 1 else frozenset({RETURN})

    def start(self) -> TurnState:
        """The beginning of a turn."""
        return TurnState(self.course)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedTurn, (self.origin,)


class PackedTurn:
    """A turn that was compiled in another process, and is compiled here when its first state is started."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._turn: CompiledTurn | None = None

    def start(self) -> TurnState:
        """The beginning of a turn. The first call blocks, and raises, as `compile_turn` does."""
        if self._turn is None:
            self._turn = compile_turn(*self.origin)
        return self._turn.start()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedTurn, (self.origin,)


def compile_turn(
    rules: TurnRules,
    tools: Iterable[Tool] = (),
    builtin_tools: Iterable[ToolNamespace] = (),
    limits: GrammarLimits | None = None,
) -> CompiledTurn:
    """The grammar of a turn in which these tools are offered.

    Blocks while schemas are compiled that were not lately, up to the limit of time: not for an event loop.

    Raises RequestError for a choice of tools that cannot be kept, and for a response format or a strict
    tool's schema that cannot be enforced whole, is too large or takes too long; EngineBusy.
    """
    functions, namespaces = tuple(tools), tuple(builtin_tools)
    offered = callees(functions, namespaces, [*rules.inputs, *_text_tools(functions)])
    called = _called(rules, offered)
    formats = _formats(rules, functions, namespaces, called)
    compiled = compile_texts(formats, limits)
    allows_json_type = rules.answer.kind == "text" or rules.answer.is_json
    headers = message_headers(final_body(compiled.get(_ANSWER)), allows_json_type)
    for callee in called:
        subject = _subject(callee)
        add_call_headers(headers, callee, call_body(compiled.get(subject), subject))
    warnings = (text.warning(subject) for subject, text in compiled.items())
    return CompiledTurn(
        Course(
            headers=headers,
            allows_final=rules.tool_choice != "required",
            max_calls=rules.max_calls if called else 0,
            final_is_bound=rules.answer.kind != "text",
            max_reasoning_tokens=rules.max_reasoning_tokens if rules.allows_reasoning else 0,
            other_authors=_first_tokens(called),
        ),
        tuple(warning for warning in warnings if warning is not None),
        (rules, functions, namespaces, limits),
    )


def _text_tools(tools: tuple[Tool, ...]) -> list[str]:
    return [tool.name for tool in tools if tool.parameters == {"type": "string"}]


def _called(rules: TurnRules, offered: list[Callee]) -> list[Callee]:
    """The tools that may be called."""
    names = {callee.name for callee in offered} | {callee.name.split(".")[0] for callee in offered}
    for name in rules.allowed_tools or ():
        if name not in names:
            known = ", ".join(callee.name for callee in offered) or "none"
            raise RequestError(f"tool_choice names {name!r}; the tools are: {known}")
    for callee in offered:
        if callee.recipient.split() != [callee.recipient]:
            raise RequestError(f"tool {callee.name!r} has blanks in its name, and no header can hold them")
    called = [] if rules.tool_choice == "none" else [c for c in offered if _is_allowed(rules, c)]
    if rules.tool_choice == "required" and not called:
        raise RequestError("tool_choice is 'required'; there is no tool to call")
    return called


def _is_allowed(rules: TurnRules, callee: Callee) -> bool:
    allowed = rules.allowed_tools
    if allowed is None or callee.name in allowed:
        return True
    is_builtin = callee.recipient == callee.name
    return is_builtin and callee.name.split(".")[0] in allowed


def _subject(callee: Callee) -> str:
    return f"tool {callee.name!r}"


def _formats(
    rules: TurnRules, tools: tuple[Tool, ...], namespaces: tuple[ToolNamespace, ...], called: list[Callee]
) -> dict[str, TextFormat]:
    """Of everything that is not free text, by what errors call it."""
    parameters = {tool.name: tool.parameters for tool in tools}
    for namespace in namespaces:
        for tool in namespace.tools:
            parameters[f"{namespace.name}.{tool.name}"] = tool.parameters
    formats = {_ANSWER: rules.answer}
    for callee in called:
        subject = _subject(callee)
        if callee.takes_json:
            is_strict = callee.name in rules.strict_tools
            formats[subject] = arguments_format(parameters[callee.name], subject, is_strict)
        else:
            formats[subject] = rules.inputs.get(callee.name, FREE_TEXT)
    return {subject: form for subject, form in formats.items() if form.kind != "text"}


def _first_tokens(called: list[Callee]) -> tuple[int, ...]:
    encode = vocabulary().encode
    return tuple(dict.fromkeys(encode(callee.recipient)[0] for callee in called))
