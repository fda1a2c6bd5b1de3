"""Stop strings in streamed text: what may be shown now, what must wait, and where the text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harmonium.engine.protocol import Token


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A text and the tokens that it is made of."""

    text: str
    tokens: tuple[Token, ...]


class StopText:
    """Looks for stop strings in one text that comes in pieces.

    Text that may be the beginning of a stop string waits until more comes. A piece of which only a part can
    be shown gives its tokens with that part.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: none of them empty."""
        assert all(stops), "an empty stop string ends every text"
        self._stops = tuple(stops)
        self._waiting: list[TextPiece] = []
        self._text = ""
        self.found: str | None = None
        """The stop string that ended the text; nothing is shown from its beginning on."""

    def push(self, text: str, tokens: tuple[Token, ...]) -> TextPiece | None:
        """Take more text; what may be shown now."""
        if self.found is not None:
            return None
        self._waiting.append(TextPiece(text, tokens))
        self._text += text
        places = [(place, stop) for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if places:
            # The stop that is whole first, as if the text had come letter by letter.
            place, self.found = min(places, key=lambda found: (found[0] + len(found[1]), found[0]))
            return self._take(place)
        return self._take(len(self._text) - self._held())

    def finish(self) -> TextPiece | None:
        """The text is over: what waited and is no stop string after all."""
        return None if self.found is not None else self._take(len(self._text))

    def _held(self) -> int:
        """Characters at the end that are the beginning of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for count in range(min(longest, len(self._text)), 0, -1):
            tail = self._text[-count:]
            if any(stop.startswith(tail) for stop in self._stops):
                return count
        return 0

    def _take(self, count: int) -> TextPiece | None:
        """The first `count` characters that wait."""
        if count == 0:
            return None
        shown, self._text = self._text[:count], self._text[count:]
        tokens: list[Token] = []
        while count > 0:
            piece = self._waiting.pop(0)
            tokens += piece.tokens
            if len(piece.text) > count:
                self._waiting.insert(0, TextPiece(piece.text[count:], ()))
            count -= len(piece.text)
        return TextPiece(shown, tuple(tokens))
