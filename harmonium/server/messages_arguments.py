"""A call's arguments as they come -> text that adds up to a JSON object whatever the model wrote.

    arguments = ObjectText()
    sent = arguments.push('{"a": 1')    # '{': the number may go on
    sent += arguments.finish(True)

Anthropic's clients parse what they have got after every event and fail on what is no JSON. Under the grammar
arguments always are JSON; without it they are what they are, so text waits until it can be completed.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Literal

from pydantic_core import from_json

RAW_KEY = "raw_arguments"
"""Holds all that the model wrote where this is no JSON object."""

_MAX_DEPTH = 100
_MAX_SCALAR_CHARS = 300
_BLANKS = " \t\r\n"
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGINNING = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SCALAR_CHARS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")
_CLOSERS = {"{": "}", "[": "]"}

_Expected = Literal[
    "start", "first_key", "key", "key_text", "colon", "first", "value", "text", "scalar", "after",
    "end", "nothing",
]  # fmt: skip
"""What comes next. first: a value or the list's end. after: what follows a value. end: the object is whole.
nothing: it is no object.
"""


def object_of(sent: str) -> dict[str, Any]:
    """The object that a client makes of the text sent; of a call that was cut off, what is whole of it."""
    value = from_json(sent, allow_partial=True) if sent else {}
    assert isinstance(value, dict), "what is sent begins with a brace"
    return value


class ObjectText:
    """The text of one call.

    What `push` gives is the beginning of an object and can be closed at its end. Text behind the object is
    dropped. Where the text is no object, the object as far as it came is closed, with all of the text in it
    under the name RAW_KEY.
    """

    def __init__(self) -> None:
        self._raw: list[str] = []
        self._held: list[str] = []
        self._open: list[str] = []
        self._expected: _Expected = "start"
        self._is_in_text = False
        self._has_member = False
        self._escape = ""
        self._is_half_pair = False
        self._scalar = ""

    def push(self, text: str) -> str:
        """Take more; what may be sent now."""
        self._raw.append(text)
        sent: list[str] = []
        for char in text:
            if self._expected in ("end", "nothing"):
                break
            self._held.append(char)
            self._take(char)
            if self._expected == "end":
                sent += self._held[:-1]  # the last brace waits for `finish`
            elif self._can_be_closed():
                sent += self._held
                self._held.clear()
        return "".join(sent)

    def finish(self, is_complete: bool) -> str:
        """The call is over; the rest. is_complete: the model ended it. One that was cut off stays open."""
        if self._expected == "end":
            return "}"
        if not is_complete and self._expected != "nothing":
            return ""
        raw = json.dumps({RAW_KEY: "".join(self._raw)}, ensure_ascii=False)
        if not self._open:
            return raw
        quote = '"' if self._is_in_text else ""
        inner = "".join(_CLOSERS[bracket] for bracket in reversed(self._open[1:]))
        return quote + inner + (", " if self._has_member else "") + raw.removeprefix("{")

    def _can_be_closed(self) -> bool:
        """Whether brackets, and a quote in a text, are all that is missing. Keeps what `finish` must know."""
        is_text = self._expected == "text"
        if is_text:
            is_safe = not self._escape and not self._is_half_pair
        else:
            is_safe = self._expected in ("first_key", "first", "after")
        if is_safe:
            self._is_in_text = is_text
            self._has_member |= self._expected != "first_key" or len(self._open) > 1
        return is_safe

    def _take(self, char: str) -> None:
        if self._expected in ("text", "key_text"):
            self._take_text(char)
        elif self._expected == "scalar":
            if char in _SCALAR_CHARS:
                self._scalar += char
                return
            self._expected = "after" if _is_scalar(self._scalar) else "nothing"
            self._take(char)
        elif char not in _BLANKS and self._expected != "nothing":
            self._expected = self._after_mark(char)

    def _after_mark(self, char: str) -> _Expected:
        """What comes behind a character that stands between texts and scalars."""
        match self._expected, char:
            case ("start" | "first" | "value", "{") | ("first" | "value", "["):
                if len(self._open) == _MAX_DEPTH:
                    return "nothing"
                self._open.append(char)
                return "first_key" if char == "{" else "first"
            case ("first_key" | "key", '"'):
                return "key_text"
            case ("colon", ":"):
                return "value"
            case ("first" | "value", '"'):
                return "text"
            case ("first" | "value", _) if char in _SCALAR_CHARS:
                self._scalar = char
                return "scalar"
            case ("after", ","):
                return "key" if self._open[-1] == "{" else "value"
            case ("after" | "first_key" | "first", _) if char == _CLOSERS[self._open[-1]]:
                self._open.pop()
                return "after" if self._open else "end"
        return "nothing"

    def _take_text(self, char: str) -> None:
        is_broken = False
        if self._escape:
            self._escape += char
            if _ESCAPE.fullmatch(self._escape):
                is_broken = self._breaks_pair(self._escape)
                self._escape = ""
            else:
                is_broken = not _ESCAPE_BEGINNING.fullmatch(self._escape)
        elif char == "\\":
            self._escape = char
        elif char == '"' and not self._is_half_pair:
            self._expected = "colon" if self._expected == "key_text" else "after"
        else:
            is_broken = self._is_half_pair or char < " "
        if is_broken:
            self._expected = "nothing"

    def _breaks_pair(self, escape: str) -> bool:
        """Whether a surrogate's escape stands alone."""
        code = int(escape[2:], 16) if escape[1] == "u" else 0
        is_second = 0xDC00 <= code <= 0xDFFF
        is_broken = is_second != self._is_half_pair
        self._is_half_pair = 0xD800 <= code <= 0xDBFF
        return is_broken


def _is_scalar(text: str) -> bool:
    if len(text) > _MAX_SCALAR_CHARS or not _SCALAR.fullmatch(text):
        return False
    return text in ("true", "false", "null") or math.isfinite(float(text))
