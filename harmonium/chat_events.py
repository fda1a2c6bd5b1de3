"""What a chat turn is made of while it streams, and the whole that the stream adds up to.

A turn is: `TurnStarted`, then for each message of the model in order a start, deltas and an end,
`Diagnostic`s where something was malformed, and exactly one `Finish` as the last event. `ResultBuilder`
folds the events into a `ChatResult`; both faces of an API, streamed or not, read the same events and so
cannot differ.

    TurnStarted
    MessageStarted  (ReasoningDelta | ContentDelta)*   MessageEnded      reasoning, or text for the user
    ToolCallStarted  ToolArgumentsDelta*               ToolCallEnded
    Diagnostic
    Finish
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from harmonium.engine.protocol import Token
from harmonium.errors import HarmoniumError
from harmonium.harmony.messages import Message
from harmonium.harmony.parse import Diagnostic

MessageKind = Literal["reasoning", "content"]

ChatFinishReason = Literal["stop", "tool_calls", "length", "aborted", "error"]
"""stop: the model ended its turn. tool_calls: it waits for the result of a declared tool. length:
max_tokens or the context was reached, or the tokens ended before the turn did. aborted: the engine was
closed. error: it failed.
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a turn. completion_tokens holds everything that the model wrote, headers and stop token
    included.

    reasoning_tokens: those of them that are text of the reasoning. cached_tokens: prompt tokens from the
    prefix cache.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The request was rendered and admitted; it may still wait in the queue. warnings: what its grammar does
    not enforce.
    """

    request_id: str
    prompt_tokens: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MessageStarted:
    """A message begins. index: counts messages and tool calls of the turn from 0. channel: analysis,
    commentary (content before a tool call) or final.
    """

    index: int
    kind: MessageKind
    channel: str | None


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of a reasoning message, never "".

    tokens: those that this text is made of, with log-probabilities if asked for. separator: what stands
    between this text and an earlier message's where an API has one field for all reasoning; else "".
    """

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    separator: str = ""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More text for the user, never "". Fields are those of ReasoningDelta."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    separator: str = ""


@dataclass(frozen=True, slots=True)
class MessageEnded:
    """A message is over. message: for the history, with the tokens that the model wrote where it came
    whole and well formed. is_complete: the model ended it; False where it was cut off.
    """

    index: int
    kind: MessageKind
    message: Message
    is_complete: bool


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A tool call begins. name: as the client declared it; recipient: as the model wrote it.

    is_declared: the request offered this tool. A call of any other tool is reported and never counts for
    finish_reason.
    """

    index: int
    call_id: str
    name: str
    recipient: str
    is_declared: bool


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """More of a call's arguments, as the model wrote them; nobody has checked that they are JSON."""

    index: int
    call_id: str
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnded:
    """A call is over. Fields are those of MessageEnded; message.content holds all arguments."""

    index: int
    call_id: str
    message: Message
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event. token_ids: everything that the model wrote. error: when finish_reason is "error".
    stop_text: which of the request's stop texts ended the turn, if one did.
    """

    finish_reason: ChatFinishReason
    usage: Usage
    token_ids: tuple[int, ...]
    error: HarmoniumError | None = None
    stop_text: str | None = None


ChatEvent: TypeAlias = (
    TurnStarted
    | MessageStarted
    | ReasoningDelta
    | ContentDelta
    | MessageEnded
    | ToolCallStarted
    | ToolArgumentsDelta
    | ToolCallEnded
    | Diagnostic
    | Finish
)


@dataclass(frozen=True, slots=True)
class TextItem:
    """A message of the turn. separator, tokens, message, is_complete: as in the events."""

    kind: MessageKind
    channel: str | None
    text: str
    separator: str
    tokens: tuple[Token, ...]
    message: Message
    is_complete: bool


@dataclass(frozen=True, slots=True)
class ToolCallItem:
    """A tool call of the turn. arguments: as the model wrote them, JSON or not."""

    call_id: str
    name: str
    recipient: str
    arguments: str
    is_declared: bool
    message: Message
    is_complete: bool


@dataclass(frozen=True, slots=True)
class ChatResult:
    """A whole turn. items: in the order of the model; token_ids: everything that it wrote; warnings: what the
    grammar did not enforce; stop_text: as in `Finish`.
    """

    request_id: str
    items: tuple[TextItem | ToolCallItem, ...]
    diagnostics: tuple[Diagnostic, ...]
    finish_reason: ChatFinishReason
    usage: Usage
    token_ids: tuple[int, ...]
    error: HarmoniumError | None = None
    warnings: tuple[str, ...] = ()
    stop_text: str | None = None

    @property
    def reasoning(self) -> str:
        """All reasoning in order, a line end between messages; "" where there is none."""
        return self._joined("reasoning")

    @property
    def content(self) -> str:
        """All text for the user in order, a line end between messages; "" where there is none."""
        return self._joined("content")

    @property
    def tool_calls(self) -> tuple[ToolCallItem, ...]:
        """Calls in order, those of undeclared tools included."""
        return tuple(item for item in self.items if isinstance(item, ToolCallItem))

    @property
    def content_tokens(self) -> tuple[Token, ...]:
        """Tokens of the visible text, with log-probabilities if they were asked for."""
        texts = (item for item in self.items if isinstance(item, TextItem) and item.kind == "content")
        return tuple(token for item in texts for token in item.tokens)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turn as history: rendered, it gives the tokens that the model wrote where those were well
        formed.

        A call that was cut off is left out: no result can follow it.
        """
        return tuple(
            item.message for item in self.items if item.is_complete or not isinstance(item, ToolCallItem)
        )

    def _joined(self, kind: MessageKind) -> str:
        texts = (item for item in self.items if isinstance(item, TextItem) and item.kind == kind)
        return "".join(item.separator + item.text for item in texts)


class ResultBuilder:
    """Folds the events of one turn, in order, into a ChatResult."""

    def __init__(self) -> None:
        self._request_id = ""
        self._prompt_tokens = 0
        self._warnings: tuple[str, ...] = ()
        self._open: MessageStarted | ToolCallStarted | None = None
        self._text: list[str] = []
        self._separator = ""
        self._tokens: list[Token] = []
        self._items: list[TextItem | ToolCallItem] = []
        self._diagnostics: list[Diagnostic] = []
        self._finish: Finish | None = None

    def push(self, event: ChatEvent) -> None:
        """Take the next event."""
        match event:
            case TurnStarted():
                self._request_id, self._prompt_tokens = event.request_id, event.prompt_tokens
                self._warnings = event.warnings
            case MessageStarted() | ToolCallStarted():
                self._open, self._text, self._separator, self._tokens = event, [], "", []
            case ContentDelta() | ReasoningDelta():
                self._text.append(event.text)
                self._separator += event.separator
                self._tokens += event.tokens
            case ToolArgumentsDelta():
                self._text.append(event.text)
            case MessageEnded() | ToolCallEnded():
                self._items.append(self._item(event.message, event.is_complete))
                self._open = None
            case Diagnostic():
                self._diagnostics.append(event)
            case Finish():
                self._finish = event

    def _item(self, message: Message, is_complete: bool) -> TextItem | ToolCallItem:
        start, text = self._open, "".join(self._text)
        if isinstance(start, MessageStarted):
            tokens = tuple(self._tokens)
            return TextItem(start.kind, start.channel, text, self._separator, tokens, message, is_complete)
        assert start is not None, "an item ends after it began"
        return ToolCallItem(
            start.call_id, start.name, start.recipient, text, start.is_declared, message, is_complete
        )

    def result(self) -> ChatResult:
        """The turn; whole after `Finish`. Before it, as when somebody left the stream, finish_reason is
        "aborted", a message in progress is an item that is not complete, and completion tokens are those
        of shown text.
        """
        items = list(self._items)
        if self._open is not None:
            channel = self._open.channel if isinstance(self._open, MessageStarted) else "commentary"
            message = Message("assistant", "".join(self._text), channel=channel)
            items.append(self._item(message, is_complete=False))
        finish = self._finish or Finish("aborted", self._partial_usage(items), ())
        return ChatResult(
            request_id=self._request_id,
            items=tuple(items),
            diagnostics=tuple(self._diagnostics),
            finish_reason=finish.finish_reason,
            usage=finish.usage,
            token_ids=finish.token_ids,
            error=finish.error,
            warnings=self._warnings,
            stop_text=finish.stop_text,
        )

    def _partial_usage(self, items: list[TextItem | ToolCallItem]) -> Usage:
        texts = [item for item in items if isinstance(item, TextItem)]
        reasoning = sum(len(item.tokens) for item in texts if item.kind == "reasoning")
        return Usage(self._prompt_tokens, sum(len(item.tokens) for item in texts), reasoning)
