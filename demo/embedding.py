"""How tokens are embedded before training: digits and letters can be read off at once.

A question holds its numbers as one token each ("385"), and its words too. Learning from nothing which digits
and letters a thousand tokens are made of takes most of a short training. So each row starts as a sum of
codes in dimensions of their own: for each letter at each position from the start, for each digit at each
position from the right, the length, what stands before the letters (a blank, a quote) and their case, the
class of the word (city, name, ...), and a random code that " Paris", "Paris" and "paris" share. All of it is
trained from there on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from demo.words import values
from harmonium.harmony.vocabulary import vocabulary

LETTER_POSITIONS, LETTER_CODE = 8, 16
DIGIT_POSITIONS, DIGIT_CODE = 3, 10
LENGTH_CODE, FLAG_CODE = 8, 12
_LEADING = {"": 0, " ": 1, '"': 2, ",": 3, ".": 4, "_": 5, "\n": 6, ":": 7}
_OTHER_LEADING, _LOWER, _CAPITALIZED, _UPPER, _NO_WORD = 8, 9, 10, 11, 12


class _Codes:
    """Random codes, drawn in a fixed order."""

    def __init__(self, width: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.letters = self._spread(26, LETTER_CODE)
        self.digits = self._spread(10, DIGIT_CODE)
        self.lengths = self._spread(10, LENGTH_CODE)
        self.flags = self._spread(14, FLAG_CODE)
        self.own_start = (
            LETTER_POSITIONS * LETTER_CODE + DIGIT_POSITIONS * DIGIT_CODE + LENGTH_CODE + FLAG_CODE
        )
        self._own_width = width - self.own_start
        self._own: dict[str, Tensor] = {}
        self.classes = {kind: self.fresh() for kind in values()}
        self.number = self.fresh()

    def fresh(self) -> Tensor:
        return functional.normalize(torch.randn(self._own_width, generator=self._generator), dim=0)

    def own(self, word: str) -> Tensor:
        if word not in self._own:
            self._own[word] = self.fresh()
        return self._own[word]

    def _spread(self, count: int, width: int) -> Tensor:
        """Unit vectors as far from each other as 300 steps of descent bring them."""
        with torch.enable_grad():
            free = functional.normalize(torch.randn(count, width, generator=self._generator), dim=-1)
            free.requires_grad_()
            optimizer = torch.optim.Adam([free], lr=0.02)
            for _ in range(300):
                unit = functional.normalize(free, dim=-1)
                loss = torch.logsumexp((unit @ unit.T - torch.eye(count)) * 10, -1).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return functional.normalize(free.detach(), dim=-1)


def structured_embedding(used: list[int], width: int, seed: int = 0) -> Tensor:
    """[U, width], root mean square 1. used: token ids; row 0 is the shared class, whatever its id."""
    codes = _Codes(width, seed)
    kinds: dict[str, list[str]] = {}
    for kind, words in values().items():
        for word in words:
            kinds.setdefault(word.lower(), []).append(kind)
    rows = torch.zeros(len(used), width)
    for index, (row, token) in enumerate(zip(rows, used, strict=True)):
        text = vocabulary().token_bytes(token).decode("utf-8", "replace") if index else ""
        body = text.lstrip(' ",._\n:')
        if text.isascii() and text.isdigit():
            _write_number(row, codes, text)
        elif body.isascii() and body.isalpha():
            _write_word(row, codes, text[: len(text) - len(body)], body, kinds)
        else:
            _flags(row, codes)[:] = codes.flags[_NO_WORD] * 0.7
            row[codes.own_start :] = codes.fresh() * 2
    return rows / rows.pow(2).mean().sqrt()


_DIGIT_START = LETTER_POSITIONS * LETTER_CODE
_LENGTH_START = _DIGIT_START + DIGIT_POSITIONS * DIGIT_CODE


def _flags(row: Tensor, codes: _Codes) -> Tensor:
    return row[codes.own_start - FLAG_CODE : codes.own_start]


def _write_number(row: Tensor, codes: _Codes, text: str) -> None:
    for position, digit in enumerate(reversed(text)):
        start = _DIGIT_START + position * DIGIT_CODE
        row[start : start + DIGIT_CODE] = codes.digits[int(digit)] * 1.3
    row[_LENGTH_START : _LENGTH_START + LENGTH_CODE] = codes.lengths[len(text) - 1] * 0.7
    row[codes.own_start :] = codes.number * 1.2 + codes.fresh() * 0.3
    _flags(row, codes)[:] = codes.flags[0] * 0.5


def _write_word(row: Tensor, codes: _Codes, leading: str, body: str, kinds: dict[str, list[str]]) -> None:
    word = body.lower()
    for position, letter in enumerate(word[:LETTER_POSITIONS]):
        row[position * LETTER_CODE : (position + 1) * LETTER_CODE] = codes.letters[ord(letter) - ord("a")]
    row[_LENGTH_START : _LENGTH_START + LENGTH_CODE] = codes.lengths[min(len(word), 10) - 1] * 0.7
    capitalized = _CAPITALIZED if body[0].isupper() and len(body) > 1 else _UPPER
    case = _LOWER if body.islower() else capitalized
    _flags(row, codes)[:] = (codes.flags[_LEADING.get(leading, _OTHER_LEADING)] + codes.flags[case]) * 0.7
    row[codes.own_start :] = codes.own(word) * 1.2
    for kind in kinds.get(word, ()):
        row[codes.own_start :] += codes.classes[kind] * 0.8
