"""Text on a terminal or into a pipe: dim lines, and a region that can be drawn over.

Escape codes go to a terminal alone. What a model writes is cleaned of control characters there, so that an
answer cannot move the cursor, change the title or worse.
"""

from __future__ import annotations

import os
import re
import time
from typing import TextIO

from prompt_toolkit.utils import get_cwidth

from harmonium.config import has_escape_codes

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
_CLEAR_BELOW = "\x1b[0J"

# C0 and C1 controls but for line feed and tab, and the marks that reorder text on a line.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_REDRAW_SECONDS = 0.05
"""Shortest time between two drawings of a region: a fast model writes more often than an eye sees."""


def printable(text: str) -> str:
    """The text with control characters, tab and line feed excepted, replaced by U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def wrap(text: str, width: int) -> list[str]:
    """The rows that the text takes on a terminal this many cells wide; wide characters take two."""
    rows = []
    for line in text.expandtabs(4).split("\n"):
        start, cells = 0, 0
        for place, character in enumerate(line):
            size = max(0, get_cwidth(character))
            if cells + size > width:
                rows.append(line[start:place])
                start, cells = place, 0
            cells += size
        rows.append(line[start:])
    return rows


class Screen:
    """Where an interactive program writes. Not a terminal: plain text, no regions."""

    def __init__(self, out: TextIO, is_terminal: bool | None = None) -> None:
        """is_terminal: whether escape codes are understood; None asks `out` and the environment."""
        self._out = out
        self.is_terminal = (out.isatty() and has_escape_codes()) if is_terminal is None else is_terminal
        self._at_line_start = True

    def write(self, text: str) -> None:
        """Write and flush."""
        if not text:
            return
        self._out.write(printable(text) if self.is_terminal else text)
        self._out.flush()
        self._at_line_start = text.endswith("\n")

    def dim(self, text: str) -> None:
        """Write dimmed where that is possible."""
        if not text:
            return
        self._out.write(f"{DIM}{printable(text)}{PLAIN}" if self.is_terminal else text)
        self._out.flush()
        self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Go to the start of a line, if not there."""
        if not self._at_line_start:
            self.write("\n")

    def line(self, text: str) -> None:
        """A dimmed line of its own."""
        self.end_line()
        self.dim(text)
        self.write("\n")

    def region(self) -> Region:
        """A place for text that is drawn over as it grows and goes away at the end."""
        self.end_line()
        return Region(self._out, self.is_terminal)


class Region:
    """The last rows of a growing text, dimmed; `clear` takes them away. Draws nothing but on a terminal."""

    MAX_ROWS = 8

    def __init__(self, out: TextIO, is_terminal: bool) -> None:
        self._out = out
        self._is_terminal = is_terminal
        self._text = ""
        self._rows = 0
        self._drawn_at = 0.0

    def add(self, text: str) -> None:
        """More text. Not every call draws."""
        self._text += printable(text)
        if self._is_terminal and time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
            self._draw()

    def _draw(self) -> None:
        columns, lines = _terminal_size(self._out)
        width = max(1, columns - 1)  # the last column would make some terminals wrap on their own
        # Only what can be seen is wrapped: the work of a drawing does not grow with the text.
        rows = wrap(self._text[-width * (self.MAX_ROWS + 1) :], width)[
            -max(1, min(self.MAX_ROWS, lines - 2)) :
        ]
        self._out.write(self._erasing() + "".join(f"{DIM}{row}{PLAIN}\n" for row in rows))
        self._out.flush()
        self._rows = len(rows)
        self._drawn_at = time.monotonic()

    def clear(self) -> None:
        """Take the region's rows off the screen."""
        if self._rows:
            self._out.write(self._erasing())
            self._out.flush()
            self._rows = 0

    def _erasing(self) -> str:
        return f"\x1b[{self._rows}A\r{_CLEAR_BELOW}" if self._rows else ""


def _terminal_size(out: TextIO) -> tuple[int, int]:
    try:
        size = os.get_terminal_size(out.fileno())
    except (OSError, ValueError):
        return 80, 24
    return size.columns or 80, size.lines or 24
