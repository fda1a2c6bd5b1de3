"""A training example of the demo model, its token ids, and the split between training and held-out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from harmonium.harmony.messages import (
    CONSTRAINED_JSON,
    Conversation,
    Message,
    ReasoningEffort,
    ResponseFormat,
    Tool,
    function_recipient,
)
from harmonium.harmony.render import opening_messages, render_message, render_messages
from harmonium.harmony.vocabulary import CHANNEL, END, MESSAGE, RETURN, START, vocabulary

CUT = "\0"
"""Stands in an answer where a new token has to start, whatever the tokenizer would have joined."""

UNKNOWN = "\1"
"""Stands in a question for a token that training never shows by itself: one of those that share a row."""

HELD_OUT_ONE_IN = 10
"""Of the operands, wordings, tool sets, schemas, ...: one in so many is never trained on."""


@dataclass(frozen=True)
class Opening:
    """What stands before the first question: the settings of the system and the developer message."""

    effort: ReasoningEffort
    date: str | None
    instructions: str | None = None
    tools: tuple[Tool, ...] = ()
    response_format: ResponseFormat | None = None

    def ids(self) -> list[int]:
        conversation = Conversation(
            instructions=self.instructions,
            tools=self.tools,
            reasoning_effort=self.effort,
            current_date=self.date,
            response_format=self.response_format,
        )
        return render_messages(opening_messages(conversation))


@dataclass(frozen=True)
class Sample:
    """One question and its answer.

    keys: what must not cross the split: the operands, the wording, ... call: name and arguments of the tool
    call that comes before the final answer, `result` the text that the tool gives back. earlier: questions
    and final answers of turns before this one.
    """

    skill: str
    question: str
    analysis: str
    final: str
    keys: tuple[str, ...]
    call: tuple[str, Mapping[str, Any]] | None = None
    result: str = ""
    result_analysis: str = ""
    earlier: tuple[tuple[str, str], ...] = ()

    def pieces(self) -> list[tuple[list[int], bool]]:
        """(token ids, whether the model writes them), in order."""
        parts: list[tuple[list[int], bool]] = []
        for question, answer in self.earlier:
            parts.append(([*_user(question), *_assistant("final", answer, END)], False))
        parts.append(([*_user(self.question), START, *_encode("assistant")], False))
        parts.append((_assistant("analysis", self.analysis, END)[2:], True))
        if self.call is not None:
            parts.append((_call(*self.call), True))
            parts.append(([*_tool_result(self.call[0], self.result), START, *_encode("assistant")], False))
            parts.append((_assistant("analysis", self.result_analysis, END)[2:], True))
        parts.append((_assistant("final", self.final, RETURN), True))
        return parts


def is_held_out(key: str) -> bool:
    """Decided by the text of the key alone, so that no list has to be kept."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def encode_answer(text: str) -> list[int]:
    """Token ids of a text in which CUT may stand."""
    return [token for piece in text.split(CUT) if piece for token in _encode(piece)]


def letter_by_letter(text: str) -> str:
    return CUT + CUT.join(text) + CUT


def plain(text: str) -> str:
    """The text as a reader sees it."""
    return text.replace(CUT, "")


def compact_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@lru_cache(maxsize=4096)
def _encode_cached(text: str) -> tuple[int, ...]:
    return tuple(vocabulary().encode(text))


def _encode(text: str) -> Sequence[int]:
    return _encode_cached(text)


def _user(text: str) -> list[int]:
    return render_message(Message("user", text))


def _assistant(channel: str, text: str, last: int) -> list[int]:
    return [START, *_encode("assistant"), CHANNEL, *_encode(channel), MESSAGE, *encode_answer(text), last]


def _call(name: str, arguments: Mapping[str, Any]) -> list[int]:
    return render_message(
        Message(
            "assistant",
            compact_json(arguments),
            channel="commentary",
            recipient=function_recipient(name),
            content_type=CONSTRAINED_JSON,
        )
    )


def _tool_result(name: str, text: str) -> list[int]:
    return render_message(
        Message("tool", text, channel="commentary", recipient="assistant", name=function_recipient(name))
    )
