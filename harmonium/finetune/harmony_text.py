"""A conversation written out in Harmony's own text, special tokens and all -> its messages' tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from harmonium.harmony.vocabulary import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, vocabulary

_SPECIAL = {
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|channel|>": CHANNEL,
    "<|constrain|>": CONSTRAIN,
    "<|return|>": RETURN,
    "<|call|>": CALL,
}
_SPLIT = re.compile("(" + "|".join(map(re.escape, _SPECIAL)) + ")")
_STOPS = (END, RETURN, CALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """A message as tokens, from <|start|> to its closing token. role: "assistant", or whose it is else.

    channel: None: none, or the message is a call. weight: what the loss of its tokens counts.
    """

    ids: tuple[int, ...]
    role: str
    channel: str | None
    weight: float


def pieces_of_text(text: str) -> list[Piece]:
    """The messages of a text such as "<|start|>user<|message|>Hi<|end|><|start|>assistant...<|return|>".

    Raises ValueError when it is not made of whole messages, or none of them is the assistant's.
    """
    parts = [part for part in _SPLIT.split(text) if part]
    encode = vocabulary().encode
    pieces: list[Piece] = []
    open_parts: list[str] = []
    for part in parts:
        if part == "<|start|>" and open_parts:
            raise ValueError(f"harmony: message {len(pieces) + 1} has a second <|start|> before its end")
        if part != "<|start|>" and not open_parts:
            raise ValueError(f"harmony: {part[:40]!r} stands before <|start|> of message {len(pieces) + 1}")
        open_parts.append(part)
        if _SPECIAL.get(part) in _STOPS:
            ids = [token for each in open_parts for token in _ids_of(each, encode)]
            pieces.append(_piece(open_parts, tuple(ids), len(pieces) + 1))
            open_parts = []
    if open_parts:
        raise ValueError(f"harmony: message {len(pieces) + 1} has no <|end|>, <|return|> or <|call|>")
    if not any(piece.role == "assistant" for piece in pieces):
        raise ValueError("harmony: no message is the assistant's; expected one to learn from")
    return pieces


def _ids_of(part: str, encode: Callable[[str], list[int]]) -> list[int]:
    special = _SPECIAL.get(part)
    return [special] if special is not None else encode(part)


def _piece(parts: list[str], ids: tuple[int, ...], number: int) -> Piece:
    if "<|message|>" not in parts:
        raise ValueError(f"harmony: message {number} has no <|message|>")
    header = parts[1 : parts.index("<|message|>")]
    role = re.split(r"[ :]", header[0])[0] if header and header[0] not in _SPECIAL else ""
    if not role:
        raise ValueError(f"harmony: message {number} has no author after <|start|>")
    channel = None
    if "<|channel|>" in header[:-1]:
        words = header[header.index("<|channel|>") + 1].split()
        is_call = any(" to=" in f" {word}" for word in " ".join(header).split())
        channel = words[0] if words and not is_call else None
    return Piece(ids, role, channel, 1.0)
