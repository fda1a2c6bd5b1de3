"""What a turn of the model amounts to: the events of a stream, and the turn that they add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from harmonium.harmony.messages import Message

Kind = Literal["reasoning", "content", "tool_call"]

SEPARATOR = "\n"
"""Between the texts of two messages of the same kind, where a caller wants one text."""


@dataclass(frozen=True, slots=True)
class MessageStart:
    """A message begins. index: counts messages from 0. tool_name: of a call, as clients know it, else None.

    is_declared: for a call: its tool is one of the parser's `tool_names`; True where none were given.
    """

    index: int
    kind: Kind
    channel: str | None
    recipient: str | None
    content_type: str | None
    tool_name: str | None = None
    is_declared: bool = True


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text, never "", of the message that began last. For a tool call it is a piece of the arguments.

    separator: "\\n" where this is a message's first text and an earlier message of the kind has text, else
    "".
    """

    index: int
    kind: Kind
    text: str
    separator: str = ""


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """The message is over. is_complete: the model ended it; False where the stream broke off."""

    index: int
    kind: Kind
    message: Message
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Something that the format does not allow. code: its kind. text: what was written and is shown nowhere
    else.
    """

    code: str
    text: str
    token_ids: tuple[int, ...]


Event = MessageStart | TextDelta | MessageEnd | Diagnostic


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call. arguments: the text as the model wrote it, perhaps no JSON. recipient: as written in the
    header.
    """

    name: str
    arguments: str
    recipient: str
    is_complete: bool = True
    is_declared: bool = True


@dataclass(slots=True)
class ParsedTurn:
    """All that a turn said. stopped_by: "return", "call", "end_of_text", or the reason given to finish().

    reasoning, content: the texts of their messages with SEPARATOR between. messages: as they are put into the
    history; those that came whole and well formed keep the tokens that the model wrote.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    stopped_by: str = ""


def collect(events: Iterable[Event], stopped_by: str | None) -> ParsedTurn:
    """What a stream of events amounts to."""
    turn = ParsedTurn(stopped_by=stopped_by or "")
    start: MessageStart | None = None
    for event in events:
        if isinstance(event, Diagnostic):
            turn.diagnostics.append(event)
        elif isinstance(event, MessageStart):
            start = event
        elif isinstance(event, TextDelta):
            if event.kind == "reasoning":
                turn.reasoning += event.separator + event.text
            elif event.kind == "content":
                turn.content += event.separator + event.text
        else:
            turn.messages.append(event.message)
            if start is not None and start.tool_name is not None:
                turn.tool_calls.append(_tool_call(start, event))
    return turn


def _tool_call(start: MessageStart, end: MessageEnd) -> ToolCall:
    assert start.tool_name is not None, "a call has a name"
    assert start.recipient is not None, "a call has a recipient"
    return ToolCall(start.tool_name, end.message.content, start.recipient, end.is_complete, start.is_declared)
