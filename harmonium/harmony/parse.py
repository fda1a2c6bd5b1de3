"""Token ids that the model wrote -> events: reasoning, content and tool calls, as they come. Never raises.

Three small machines: `TextDecoder` (bytes -> text), `HeaderReader` (a header -> who, where, to whom) and
`StreamParser` (messages). Rules and codes of diagnostics: docs/harmony.md.

    parser = StreamParser()
    for token_id in stream: events = parser.push(token_id)
    events = parser.finish("length")
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from harmonium.harmony.events import (
    SEPARATOR,
    Diagnostic,
    Event,
    Kind,
    MessageEnd,
    MessageStart,
    ParsedTurn,
    TextDelta,
    ToolCall,
    collect,
)
from harmonium.harmony.header import Header, HeaderReader, Problem, is_offered
from harmonium.harmony.messages import Message, function_name
from harmonium.harmony.vocabulary import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    END_OF_TEXT,
    MESSAGE,
    NUM_TEXT_TOKENS,
    RETURN,
    START,
    TextDecoder,
    vocabulary,
)

__all__ = [
    "MAX_HEADER_TOKENS",
    "Diagnostic",
    "Event",
    "Kind",
    "MessageEnd",
    "MessageStart",
    "ParsedTurn",
    "StreamParser",
    "TextDelta",
    "ToolCall",
    "collect",
    "parse",
]

MAX_HEADER_TOKENS = 256
"""A header longer than this is taken for a body whose header is missing, so that its text streams on."""


def parse(
    token_ids: Iterable[int], reason: str = "stop", tool_names: Collection[str] | None = None
) -> ParsedTurn:
    """Parse a whole turn, from after `<|start|>assistant`. The result is that of streaming the tokens."""
    parser = StreamParser(tool_names)
    return collect([*parser.push_many(token_ids), *parser.finish(reason)], parser.stopped_by)


class StreamParser:
    """Parses one turn of the assistant, token by token, from after `<|start|>assistant`.

    tool_names: the tools that were offered, as clients know them ("get_weather", "browser.search", or
    "browser" for all of that namespace); None: unknown, so every call counts as declared. max_calls: the turn
    goes on after a call when the assistant opens another message (`<|start|>assistant`), up to this number.
    Not for several threads at once.
    """

    def __init__(self, tool_names: Collection[str] | None = None, max_calls: int = 1) -> None:
        self._tool_names = None if tool_names is None else frozenset(tool_names)
        self._vocabulary = vocabulary()
        self._decoder = TextDecoder(self._vocabulary)
        self._events: list[Event] = []
        self._index = -1
        self._kinds_with_text: set[Kind] = set()
        self._stopped_by: str | None = None
        self._unread: list[int] = []
        self._calls_left = max_calls
        self._after_call: list[int] | None = None
        self._on_special: dict[int, Callable[[int], None]] = {
            START: self._on_start,
            MESSAGE: self._on_message,
            CHANNEL: self._on_header_mark,
            CONSTRAIN: self._on_header_mark,
            END: self._on_end,
            RETURN: self._on_end,
            CALL: self._on_end,
            END_OF_TEXT: self._on_end,
        }
        self._header: HeaderReader | None = None
        self._body: _Body | None = None
        self._tokens: list[int] = []
        self._is_clean = True
        self._begin_header([START, *self._vocabulary.encode("assistant")], has_role=True)

    @property
    def stopped_by(self) -> str | None:
        """What ended the turn: "return", "call", "end_of_text", the reason given to finish(); None: it goes
        on.
        """
        return self._stopped_by

    def push(self, token_id: int) -> list[Event]:
        """Take one token; give the events that it causes."""
        self._events = []
        if self._stopped_by is not None:
            self._unread.append(token_id)
        elif self._after_call is not None:
            self._push_after_call(self._after_call, token_id)
        elif 0 <= token_id < NUM_TEXT_TOKENS:
            self._on_text(token_id)
        else:
            self._on_special.get(token_id, self._on_unexpected)(token_id)
        return self._events

    def push_many(self, token_ids: Iterable[int]) -> list[Event]:
        """The events of pushing one by one."""
        return [event for token_id in token_ids for event in self.push(token_id)]

    def finish(self, reason: str) -> list[Event]:
        """The stream is over; give the last events. reason: why, kept as `stopped_by` unless a stop token
        came.
        """
        self._events = []
        if self._stopped_by is None:
            self._close(None)
            self._stopped_by = reason if self._after_call is None else "call"
        self._flush_unread("after_stop")
        return self._events

    def _push_after_call(self, held: list[int], token_id: int) -> None:
        """Between calls. Where anybody but the assistant begins to write, its turn is over."""
        if not held and token_id == START:
            held.append(token_id)
            return
        if held and token_id == self._vocabulary.id_of(b"assistant"):
            self._after_call = None
            self._on_start(START)
            self._on_text(token_id)
            return
        self._stopped_by = "call"
        if not held:
            self._unread.append(token_id)

    def _on_text(self, token_id: int) -> None:
        if self._body is not None:
            self._tokens.append(token_id)
            if self._body.kind is None:
                self._unread.append(token_id)
            else:
                self._emit_text(self._decoder.push(token_id))
        else:
            self._on_header_mark(token_id)

    def _on_header_mark(self, token_id: int) -> None:
        """A token that belongs into a header: text, <|channel|> or <|constrain|>."""
        if self._body is not None:
            if token_id == CONSTRAIN:
                self._on_unexpected(token_id)
                return
            self._diagnose("missing_end", "")
            self._close(END)
        if self._header is None:
            self._begin_stray_header()
        assert self._header is not None, "a header was begun"
        self._header.add(token_id)
        self._tokens.append(token_id)
        if self._header.num_tokens > MAX_HEADER_TOKENS:
            self._give_up_header()

    def _on_start(self, token_id: int) -> None:
        if self._header is not None and self._header.num_tokens == 0:
            self._diagnose("doubled_start", "", token_id)
        elif self._body is not None or self._header is not None:
            self._diagnose("missing_end", "")
            self._close(END)
        self._begin_header([token_id], has_role=False)

    def _on_message(self, token_id: int) -> None:
        if self._body is not None:
            self._on_unexpected(token_id)
            return
        if self._header is None:
            self._begin_stray_header()
        assert self._header is not None, "a header was begun"
        self._tokens.append(token_id)
        self._open(self._header.read(), self._header.text())

    def _on_end(self, token_id: int) -> None:
        if self._header is None and self._body is None and token_id == END:
            self._on_unexpected(token_id)
            return
        if token_id == END_OF_TEXT:
            self._diagnose("end_of_text", "", token_id)
        elif token_id == CALL and self._body is not None and self._body.kind in ("reasoning", "content"):
            self._diagnose("call_without_recipient", "", token_id)
        self._close(token_id)
        self._calls_left -= token_id == CALL
        if token_id == CALL and self._calls_left > 0:
            self._after_call = []
        elif token_id != END:
            self._stopped_by = {RETURN: "return", CALL: "call"}.get(token_id, "end_of_text")

    def _on_unexpected(self, token_id: int) -> None:
        self._diagnose("unexpected_token", "", token_id)

    def _begin_header(self, token_ids: list[int], has_role: bool, is_stray: bool = False) -> None:
        """token_ids: what the message starts with, in the history too."""
        names = self._tool_names or frozenset()
        self._header = HeaderReader(self._vocabulary, has_role, is_stray, names)
        self._tokens = token_ids
        self._is_clean = not is_stray

    def _begin_stray_header(self) -> None:
        self._diagnose("missing_start", "")
        self._begin_header([START, *self._vocabulary.encode("assistant")], has_role=False, is_stray=True)

    def _give_up_header(self) -> None:
        """Too long for a header: take it for the beginning of a body."""
        assert self._header is not None, "called while a header is read"
        header, text = self._header.read_unfinished(None), self._header.text()
        self._open(header, text)
        self._emit_text(header.body)

    def _open(self, header: Header, header_text: str) -> None:
        """Begin the body that this header announces."""
        self._header = None
        is_unknown = header.channel is None and header.recipient is None and _has(header, "unknown_channel")
        if header.is_dropped or (is_unknown and _has(header, "missing_message")):
            self._body = _Body(None, header)
            self._diagnose_header(header.problems, "dropped_header", header_text)
            return
        for code, text in header.problems:
            self._diagnose(code, text)
        kind = _kind(header)
        self._index += 1
        self._body = _Body(kind, header)
        name = None if header.recipient is None else function_name(header.recipient)
        is_declared = name is None or self._tool_names is None or is_offered(name, self._tool_names)
        if not is_declared:
            self._events.append(Diagnostic("undeclared_tool", "", ()))
        self._events.append(
            MessageStart(
                self._index, kind, _channel(header), header.recipient, header.content_type, name, is_declared
            )
        )

    def _close(self, token_id: int | None) -> None:
        """End the message that is open. token_id: the token that does it; None: the stream broke off."""
        if self._header is not None:
            self._close_header(token_id)
        if self._body is not None:
            self._close_body(token_id)
        self._header = self._body = None

    def _close_header(self, token_id: int | None) -> None:
        """The message ends in its header: its body, if any, is what stands there."""
        assert self._header is not None, "called while a header is read"
        reader, self._header = self._header, None
        if token_id is None and reader.num_tokens == 0:
            return
        header = reader.read_unfinished(token_id)
        is_call = header.recipient is not None and (header.body != "" or token_id == CALL)
        if header.body == "" and not is_call:
            self._diagnose_header(header.problems, "incomplete_header", reader.text())
            return
        self._open(header, reader.text())
        self._emit_text(header.body)

    def _close_body(self, token_id: int | None) -> None:
        assert self._body is not None, "called while a body is read"
        body = self._body
        if body.kind is None:
            self._flush_unread("dropped_text")
            return
        self._emit_text(self._decoder.finish())
        self._events.append(
            MessageEnd(self._index, body.kind, self._message(body, token_id), token_id is not None)
        )

    def _message(self, body: _Body, token_id: int | None) -> Message:
        """The message for the history: <|return|> becomes <|end|>, what broke off is closed."""
        token_ids = None
        if self._is_clean:
            is_call = token_id == CALL or (token_id is None and body.kind == "tool_call")
            token_ids = (*self._tokens, CALL if is_call else END)
        header = body.header
        return Message(
            "assistant",
            "".join(body.texts),
            channel=_channel(header),
            recipient=header.recipient,
            content_type=header.content_type,
            token_ids=token_ids,
        )

    def _emit_text(self, text: str) -> None:
        body = self._body
        if not text or body is None or body.kind is None:
            return
        separator = SEPARATOR if not body.texts and body.kind in self._kinds_with_text else ""
        if body.kind != "tool_call":
            self._kinds_with_text.add(body.kind)
        body.texts.append(text)
        self._events.append(TextDelta(self._index, body.kind, text, separator))

    def _diagnose(self, code: str, text: str, *token_ids: int) -> None:
        """Report, and remember that the message is not one to replay as it was written."""
        self._is_clean = False
        self._events.append(Diagnostic(code, text, token_ids))

    def _diagnose_header(self, problems: list[Problem], code: str, text: str) -> None:
        """Report a header of which nothing is used: its problems by name, then all its text once."""
        for problem in problems:
            self._diagnose(problem.code, "")
        self._diagnose(code, text)

    def _flush_unread(self, code: str) -> None:
        if self._unread:
            self._diagnose(code, self._vocabulary.decode(self._unread), *self._unread)
            self._unread = []


@dataclass(slots=True)
class _Body:
    """The body being read. kind None: nobody's message, kept out of the answer."""

    kind: Kind | None
    header: Header
    texts: list[str] = field(default_factory=list)


def _has(header: Header, code: str) -> bool:
    return any(problem.code == code for problem in header.problems)


def _kind(header: Header) -> Kind:
    """A recipient makes a call; final and commentary are for the user; everything else is reasoning."""
    if header.recipient is not None:
        return "tool_call"
    return "content" if header.channel in ("final", "commentary") else "reasoning"


def _channel(header: Header) -> str:
    if header.channel is not None:
        return header.channel
    return "commentary" if header.recipient is not None else "analysis"
