"""JSON Lines -> samples: token ids, and how much the loss of each counts. Needs no PyTorch.

A sample is what the model would read and write at inference: one for each of the assistant's turns in a line.
Its prompt is the conversation before the turn, as `harmony.render` makes prompts (so without the reasoning of
earlier turns), and what follows is the turn, whole. The loss is on what the model writes itself: everything
behind the first <|start|>assistant, up to and with <|return|> or <|call|>; after <|end|> also the next
<|start|>assistant, but after <|call|> not, for there the turn goes back to the caller.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.errors import ConfigError, HarmonyError
from harmonium.finetune.harmony_text import Piece, pieces_of_text
from harmonium.harmony.chat_history import messages_from_chat, tools_from_chat
from harmonium.harmony.messages import Conversation, Message, ResponseFormat, builtin_tool
from harmonium.harmony.render import opening_messages, render_message, without_old_reasoning
from harmonium.harmony.vocabulary import CALL, END, RETURN, vocabulary

MAX_LINE_BYTES = 16_000_000
MAX_ERRORS = 20
"""Bad lines that one error lists."""

_CHAT_KEYS = frozenset(
    {
        "messages",
        "tools",
        "parallel_tool_calls",
        "reasoning_effort",
        "current_date",
        "model_identity",
        "builtin_tools",
        "response_format",
        "metadata",
        "id",
    }
)


@dataclass(frozen=True, slots=True)
class Sample:
    """token_id_T: int32. weight_T: float32, what the loss of predicting each token counts; 0: nothing.

    line: of the file it comes from, from 1; 0: of none.
    """

    token_id_T: npt.NDArray[np.int32]
    weight_T: npt.NDArray[np.float32]
    line: int = 0

    @property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.weight_T[1:]))


@dataclass(frozen=True, slots=True)
class DataSettings:
    """max_tokens: longest sample. trains_analysis: whether reasoning counts. effort, current_date: of lines
    that do not say them; "drawn" draws a date by the line's number, "none" leaves it out.
    """

    max_tokens: int = 4096
    trains_analysis: bool = True
    effort: str = "medium"
    current_date: str = "drawn"


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a file holds. truncated: lines whose samples were cut at max_tokens. empty: lines of which nothing
    is left to learn.
    """

    path: Path
    num_lines: int
    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    longest: int
    truncated: tuple[int, ...]
    empty: tuple[int, ...]

    def text(self) -> str:
        """Lines for a terminal."""
        lines = [
            f"{self.path}: {self.num_lines:,} lines, {self.num_samples:,} samples, {self.num_tokens:,} "
            f"tokens, {self.num_loss_tokens:,} of them with loss; the longest has {self.longest:,}"
        ]
        for found, what in ((self.truncated, "cut at max_tokens"), (self.empty, "without anything to learn")):
            if found:
                lines.append(f"  {len(found):,} lines {what}: {_listed(found)}")
        return "\n".join(lines)


def read_data(path: str | Path, settings: DataSettings) -> tuple[list[Sample], DataReport]:
    """All samples of a JSON Lines file, in its order, and what is to be known of them.

    Raises ConfigError when the file cannot be read, holds no sample, or has bad lines: the first 20 of them,
    each with its number and reason.
    """
    path = Path(path)
    samples: list[Sample] = []
    errors: list[str] = []
    truncated: list[int] = []
    empty: list[int] = []
    num_lines = num_bad = 0
    for number, line in _lines(path):
        num_lines += 1
        try:
            whole = list(samples_of_line(line, number, settings))
        except (HarmonyError, ValueError, RecursionError) as error:
            num_bad += 1
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
            if len(errors) < MAX_ERRORS:
                errors.append(f"line {number}: {reason}")
            continue
        cut = [_cut(sample, settings.max_tokens) for sample in whole]
        if any(len(a.token_id_T) < len(b.token_id_T) for a, b in zip(cut, whole, strict=True)):
            truncated.append(number)
        kept = [sample for sample in cut if sample.num_loss_tokens]
        if not kept:
            empty.append(number)
        samples += kept
    if errors:
        more = f" (and {num_bad - len(errors):,} more)" if num_bad > len(errors) else ""
        raise ConfigError(f"{path}: {num_bad:,} of {num_lines:,} lines are bad: {'; '.join(errors)}{more}")
    if not samples:
        raise ConfigError(
            f"{path}: {num_lines:,} lines hold no sample with a loss; expected an assistant's message "
            f"in each (cut at max_tokens {settings.max_tokens:,}: {_listed(truncated) or 'none'})"
        )
    return samples, _report(path, num_lines, samples, truncated, empty)


def _report(
    path: Path, num_lines: int, samples: Sequence[Sample], truncated: list[int], empty: list[int]
) -> DataReport:
    lengths = [len(sample.token_id_T) for sample in samples]
    num_loss = sum(sample.num_loss_tokens for sample in samples)
    return DataReport(
        path, num_lines, len(samples), sum(lengths), num_loss, max(lengths), tuple(truncated), tuple(empty)
    )


def samples_of_line(line: bytes, number: int, settings: DataSettings) -> Iterator[Sample]:
    """The samples of one line. Raises HarmonyError or ValueError with the reason, without the number."""
    try:
        table = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text: byte {error.start} is {line[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} (character {error.pos + 1})") from None
    if not isinstance(table, dict):
        raise ValueError("no JSON object; expected one with 'messages' or 'harmony'")
    if "harmony" in table:
        yield _harmony_sample(table, number, settings)
    elif "messages" in table:
        yield from _chat_samples(table, number, settings)
    else:
        raise ValueError(f"has {_listed(sorted(table)) or 'no keys'}; expected 'messages' or 'harmony'")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{path}: line {number} has more than {MAX_LINE_BYTES:,} bytes")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ConfigError(f"{path}: {reason or error}") from None


def _harmony_sample(table: Mapping[str, Any], number: int, settings: DataSettings) -> Sample:
    unknown = sorted(set(table) - {"harmony", "metadata", "id"})
    if unknown:
        raise ValueError(f"no key {unknown[0]!r} is known beside 'harmony'")
    if not isinstance(table["harmony"], str):
        raise ValueError("harmony is no text")
    return _sample(pieces_of_text(table["harmony"]), 0, number, settings.trains_analysis)


def _chat_samples(table: Mapping[str, Any], number: int, settings: DataSettings) -> Iterator[Sample]:
    unknown = sorted(set(table) - _CHAT_KEYS)
    if unknown:
        raise ValueError(f"no key {unknown[0]!r} is known; expected some of {', '.join(sorted(_CHAT_KEYS))}")
    names = table.get("builtin_tools") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError("builtin_tools is no list of names")
    history = messages_from_chat(table["messages"], names)
    weights = _message_weights(table, len(history.messages), names)
    conversation = Conversation(
        instructions=history.instructions,
        tools=tools_from_chat(table.get("tools")),
        builtin_tools=tuple(builtin_tool(name) for name in names),
        reasoning_effort=table.get("reasoning_effort") or settings.effort,  # type: ignore[arg-type]
        current_date=_date(table, number, settings),
        response_format=_response_format(table.get("response_format")),
    )
    if "model_identity" in table:
        if not isinstance(table["model_identity"], str):
            raise ValueError("model_identity is no text")
        conversation = replace(conversation, model_identity=table["model_identity"])
    opening = opening_messages(conversation)
    if not any(message.role == "assistant" for message in history.messages):
        raise ValueError("messages have none of the assistant's; expected one to learn from")
    for start, end in _turns(history.messages):
        turn = zip(history.messages[start:end], weights[start:end], strict=True)
        if any(weight for message, weight in turn if message.role == "assistant"):
            yield _turn_sample(opening, history.messages, weights, (start, end), number, settings)


def _turn_sample(
    opening: tuple[Message, ...],
    messages: tuple[Message, ...],
    weights: Sequence[float],
    turn: tuple[int, int],
    number: int,
    settings: DataSettings,
) -> Sample:
    start, end = turn
    pieces = [
        Piece(tuple(render_message(message)), message.role, message.channel, 0.0)
        for message in (*opening, *without_old_reasoning(messages[:start]))
    ]
    for message, weight in zip(messages[start:end], weights[start:end], strict=True):
        ids = render_message(message)
        if message.role == "assistant" and message.channel == "final":
            ids[-1] = RETURN
        channel = None if message.recipient is not None else message.channel
        pieces.append(Piece(tuple(ids), message.role, channel, weight))
    return _sample(pieces, len(pieces) - (end - start), number, settings.trains_analysis)


def _sample(pieces: Sequence[Piece], first: int, number: int, trains_analysis: bool) -> Sample:
    """The pieces one after the other; the assistant's from number `first` on get loss.

    <|start|>assistant is the model's own where one of its messages follows another that ended in <|end|>.
    """
    prompt = 1 + len(vocabulary().encode("assistant"))
    ids: list[int] = []
    weights: list[float] = []
    goes_on = False
    for index, piece in enumerate(pieces):
        is_learned = piece.role == "assistant" and index >= first
        if not trains_analysis and piece.channel == "analysis":
            is_learned = False
        weight = piece.weight if is_learned else 0.0
        given = 0 if goes_on else min(prompt, len(piece.ids))
        ids += piece.ids
        weights += [0.0] * given + [weight] * (len(piece.ids) - given)
        if piece.channel == "final" and piece.ids[-1] == END:
            weights[-1] = 0.0  # at inference the model writes <|return|> there
        goes_on = piece.role == "assistant" and piece.ids[-1] not in (CALL, RETURN)
    return Sample(np.array(ids, np.int32), np.array(weights, np.float32), number)


def _turns(messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of what belongs to one turn of the assistant: through its tools to its final
    answer, or to the conversation's end. A turn without one of its messages is none.
    """
    start = 0
    for index, message in enumerate(messages):
        if message.role == "assistant" and message.channel == "final":
            yield start, index + 1
            start = index + 1
    if any(message.role == "assistant" for message in messages[start:]):
        last = max(index for index, message in enumerate(messages) if message.role == "assistant")
        yield start, last + 1


def _message_weights(table: Mapping[str, Any], count: int, builtin_tools: Sequence[str]) -> list[float]:
    """What each Harmony message counts: the `weight` of the chat message that it comes from."""
    messages = table["messages"]
    parallel = table.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise ValueError("parallel_tool_calls is neither true nor false")
    is_plain = True
    for index, message in enumerate(messages):
        if not parallel and len(message.get("tool_calls") or ()) > 1:
            raise ValueError(
                f"messages[{index}] has {len(message['tool_calls'])} calls, and parallel_tool_calls is false"
            )
        if message.get("weight") is None:
            continue
        is_plain = False
        weight = message["weight"]
        if message["role"] != "assistant":
            raise ValueError(
                f"messages[{index}].weight is of a {message['role']}'s; only the assistant's counts"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
            raise ValueError(f"messages[{index}].weight is {weight!r}; expected 0 to 1")
    if is_plain:
        return [1.0] * count
    weights: list[float] = []
    for index, message in enumerate(messages):
        behind = len(messages_from_chat(messages[: index + 1], builtin_tools).messages)
        weight = message.get("weight")
        weights += [1.0 if weight is None else float(weight)] * (behind - len(weights))
    return weights


def _response_format(value: object) -> ResponseFormat | None:
    """OpenAI's {"type": "json_schema", "json_schema": {...}}; "text" and None are none."""
    if value is None or value == {"type": "text"}:
        return None
    form = value.get("json_schema") if isinstance(value, dict) else None
    if not isinstance(form, dict) or not isinstance(form.get("schema"), dict):
        raise ValueError("response_format is not of type json_schema with a schema")
    return ResponseFormat(str(form.get("name", "")), form["schema"], str(form.get("description", "")))


def _date(table: Mapping[str, Any], number: int, settings: DataSettings) -> str | None:
    asked = table.get("current_date", settings.current_date)
    if asked is None or asked == "none":
        return None
    if asked == "drawn":
        # Prompts at inference have the day they are written on: none of them may be what the model relies on.
        days = random.Random(number).randrange(5 * 365)
        return (datetime.date(2025, 1, 1) + datetime.timedelta(days)).isoformat()
    try:
        return datetime.date.fromisoformat(asked).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"current_date is {asked!r}; expected YYYY-MM-DD, none or drawn") from None


def _cut(sample: Sample, max_tokens: int) -> Sample:
    if len(sample.token_id_T) <= max_tokens:
        return sample
    return Sample(sample.token_id_T[:max_tokens], sample.weight_T[:max_tokens], sample.line)


def _listed(values: Sequence[object], most: int = 10) -> str:
    shown = ", ".join(map(str, values[:most]))
    return f"{shown}, ..." if len(values) > most else shown
