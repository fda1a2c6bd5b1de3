"""Tokens of a continuation -> its text, token by token, with stop strings and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from harmonium.engine.protocol import Token, TokenEvent
from harmonium.harmony.vocabulary import NUM_TEXT_TOKENS, TextDecoder, vocabulary
from harmonium.server.logprobs import finite
from harmonium.stop_text import StopText, TextPiece


@dataclass(slots=True)
class CompletionText:
    """The text of one answer as its tokens come.

    stops: texts that end it. stop_token_ids: tokens that end it and are no part of the text.
    shows_special: special tokens appear by their names. finish_reason: set when it has ended; stop_reason:
    the stop text or the id of the stop token. token_ids: all that came.
    """

    stops: Sequence[str]
    stop_token_ids: frozenset[int]
    shows_special: bool = False
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] = field(default_factory=list)
    _decoder: TextDecoder = field(default_factory=lambda: TextDecoder(vocabulary()))
    _pending: list[Token] = field(default_factory=list)
    _stop_text: StopText | None = None

    def __post_init__(self) -> None:
        self._stop_text = StopText(self.stops) if self.stops else None

    def push(self, event: TokenEvent) -> Iterator[TextPiece]:
        """What these tokens add; nothing after the end."""
        for token in event.tokens:
            if self.finish_reason is not None:
                return
            yield from self._push_token(token)
        if event.finish_reason is not None and self.finish_reason is None:
            yield from self._end("stop" if event.finish_reason == "stop" else "length")

    def _push_token(self, token: Token) -> Iterator[TextPiece]:
        self.token_ids.append(token.token_id)
        if token.token_id in self.stop_token_ids:
            self.stop_reason = token.token_id
            yield from self._end("stop")
            return
        self._pending.append(token)
        yield from self._show(self._text_of(token.token_id))

    def _text_of(self, token_id: int) -> str:
        if token_id < NUM_TEXT_TOKENS:
            return self._decoder.push(token_id)
        return self._decoder.finish() + (vocabulary().decode([token_id]) if self.shows_special else "")

    def _show(self, text: str) -> Iterator[TextPiece]:
        if not text:
            return
        tokens, self._pending = tuple(self._pending), []
        if self._stop_text is None:
            yield TextPiece(text, tokens)
            return
        piece = self._stop_text.push(text, tokens)
        if piece is not None:
            yield piece
        if self._stop_text.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stop_text.found

    def _end(self, reason: str) -> Iterator[TextPiece]:
        yield from self._show(self._decoder.finish())
        if self.finish_reason is not None:
            return
        piece = self._stop_text.finish() if self._stop_text is not None else None
        if piece is not None:
            yield piece
        self.finish_reason = reason


class LogprobList:
    """`logprobs` of a choice: parallel lists, as the Completions API has them."""

    def __init__(self) -> None:
        self._offset = 0

    def skip(self, text: str) -> None:
        """Text that stands before the tokens."""
        self._offset += len(text)

    def of(self, tokens: Iterable[Token]) -> dict[str, Any]:
        """The lists for the next tokens. Offsets count characters, broken ones as one each."""
        found: dict[str, list[Any]] = {
            "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": [],
        }  # fmt: skip
        for token in tokens:
            found["text_offset"].append(self._offset)
            found["tokens"].append(token_text(token.token_id))
            found["token_logprobs"].append(None if token.logprob is None else finite(token.logprob))
            found["top_logprobs"].append(_top(token))
            self._offset += len(vocabulary().decode([token.token_id]))
        return found


def _top(token: Token) -> dict[str, float] | None:
    """The alternatives by their texts, the token itself among them."""
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for token_id, logprob in (*token.top_logprobs, (token.token_id, token.logprob)):
        top.setdefault(token_text(token_id), finite(logprob))
    return top


def token_text(token_id: int) -> str:
    """A token's text; "bytes:\\\\xe2\\\\x80" where it is no text, as OpenAI's API writes it."""
    raw = vocabulary().token_bytes(token_id)
    try:
        return raw.decode() if raw else vocabulary().decode([token_id])
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
