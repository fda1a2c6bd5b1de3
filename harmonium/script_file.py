"""Answers written in a file, played by a ScriptedEngine: `harmonium serve --engine script:FILE`.

One JSON object a line, one answer an object:

    {"harmony": "<|channel|>final<|message|>hi<|return|>"}     what follows <|start|>assistant
    {"token_ids": [200005, 17196, 200008, 3686, 200002]}       the same as ids
    "chunk": 3            tokens that come together (default 1)
    "delay_seconds": 0.1  before each of them
    "match": "text"       only for a request whose last user message holds this text
    "repeat": true        the line is not used up
    "grammar": true       a token that the request's grammar does not allow ends the answer with an error
    "end": "stop" | "length" | "error"   when the tokens are used up and none of them ended the turn

A request takes the first unused line whose `match` fits it; where none does, the first unused line without
`match`. In `harmony` each special token that is spelled out becomes that token. Blank lines are skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmonium.engine.protocol import EngineInfo, Request
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.errors import ConfigError, EngineError
from harmonium.harmony.vocabulary import (
    END,
    MESSAGE,
    SPECIAL_TOKENS,
    START,
    VOCABULARY_SIZE,
    vocabulary,
)

MAX_DELAY_SECONDS = 3600.0

_FIELDS = ("harmony", "token_ids", "chunk", "delay_seconds", "match", "repeat", "end", "grammar")
_ENDS = ("stop", "length", "error")
_SPECIAL_NAME = re.compile(r"(<\|[a-z_0-9]+\|>)")
_SPECIAL_IDS = {name: token_id for token_id, name in SPECIAL_TOKENS.items()}


@dataclass(frozen=True, slots=True)
class ScriptLine:
    """One answer of the file. match: None fits every request."""

    script: Script
    match: str | None = None
    is_repeated: bool = False


class ScriptPlayer:
    """Chooses the line for each request. A line that is not repeated is given once."""

    def __init__(self, lines: list[ScriptLine], name: str) -> None:
        """name: of the file, for errors."""
        self._lines = list(lines)
        self._name = name

    def check(self, request: Request) -> None:
        """Raises EngineError when no line is left for this request."""
        self._find(request)

    def take(self, request: Request) -> Script:
        """The script for this request. Raises EngineError when no line is left for it."""
        line = self._find(request)
        if not line.is_repeated:
            self._lines.remove(line)
        return line.script

    def _find(self, request: Request) -> ScriptLine:
        text = last_user_text(request.token_ids) if any(line.match for line in self._lines) else ""
        for line in self._lines:
            if line.match is not None and line.match in text:
                return line
        for line in self._lines:
            if line.match is None:
                return line
        shown = last_user_text(request.token_ids)[:80]
        raise EngineError(
            f"{self._name}: no line is left for this request (its last user message is {shown!r})"
        )


def scripted_engine(
    path: Path, model_name: str = "scripted", context_length: int = 131_072
) -> ScriptedEngine:
    """An engine that plays this file. Raises ConfigError that names file and line for what cannot be used."""
    player = ScriptPlayer(read_script(path), path.name)
    info = EngineInfo(model_name, context_length, VOCABULARY_SIZE, engine="scripted")
    return ScriptedEngine(player.take, info=info, check=player.check)


def read_script(path: Path) -> list[ScriptLine]:
    """The file's lines. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start}") from None
    lines = [
        read_line(line, f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise ConfigError(f"{path} holds no line; expected a JSON object a line")
    return lines


def read_line(text: str, where: str) -> ScriptLine:
    """One line. where: for errors. Raises ConfigError."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} is no JSON object")
    unknown = next((name for name in fields if name not in _FIELDS), None)
    if unknown is not None:
        raise ConfigError(f"{where}: no field {unknown!r}; there are {', '.join(_FIELDS)}")
    end = _choice(fields, "end", _ENDS, where)
    failure = "the script ends with an error" if end == "error" else None
    script = Script(
        _tokens(fields, where),
        error=failure,
        end="length" if end == "length" else "stop",
        tokens_per_event=int(_number(fields, "chunk", 1, 1, 1_000_000, where, is_whole=True)),
        seconds_per_event=_number(fields, "delay_seconds", 0.0, 0, MAX_DELAY_SECONDS, where),
        obeys_constraint=_flag(fields, "grammar", where),
    )
    match = fields.get("match")
    if match is not None and (not isinstance(match, str) or not match):
        raise ConfigError(f"{where}: match is {match!r}; expected a text")
    return ScriptLine(script, match, _flag(fields, "repeat", where))


def _flag(fields: Mapping[str, Any], name: str, where: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {name} is {value!r}; expected true or false")
    return value


def _tokens(fields: Mapping[str, Any], where: str) -> tuple[int, ...]:
    if ("harmony" in fields) == ("token_ids" in fields):
        raise ConfigError(f"{where}: expected one of harmony and token_ids")
    if "harmony" in fields:
        if not isinstance(fields["harmony"], str):
            raise ConfigError(f"{where}: harmony is no text")
        return harmony_tokens(fields["harmony"])
    token_ids = fields["token_ids"]
    if not isinstance(token_ids, list) or not all(type(token_id) is int for token_id in token_ids):
        raise ConfigError(f"{where}: token_ids is no list of whole numbers")
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < VOCABULARY_SIZE), None)
    if wrong is not None:
        raise ConfigError(f"{where}: token id {wrong:,} is outside 0 to {VOCABULARY_SIZE - 1:,}")
    return tuple(token_ids)


def _number(
    fields: Mapping[str, Any],
    name: str,
    default: float,
    low: float,
    high: float,
    where: str,
    is_whole: bool = False,
) -> float:
    value = fields.get(name, default)
    is_number = type(value) is int or (isinstance(value, float) and not is_whole)
    if not is_number or not low <= value <= high:
        kind = "a whole number" if is_whole else "a number"
        raise ConfigError(f"{where}: {name} is {value!r}; expected {kind} from {low:,} to {high:,}")
    return float(value)


def _choice(fields: Mapping[str, Any], name: str, known: tuple[str, ...], where: str) -> str:
    value = fields.get(name, known[0])
    if value not in known:
        raise ConfigError(f"{where}: {name} is {value!r}; expected one of {', '.join(known)}")
    return str(value)


def harmony_tokens(text: str) -> tuple[int, ...]:
    """Token ids of a text in which each special token's name, such as <|message|>, stands for the token."""
    ids: list[int] = []
    for part in _SPECIAL_NAME.split(text):
        ids += [_SPECIAL_IDS[part]] if part in _SPECIAL_IDS else vocabulary().encode(part)
    return tuple(ids)


def last_user_text(token_ids: tuple[int, ...]) -> str:
    """The text of the last user message of a prompt; "" where there is none."""
    header = (START, *vocabulary().encode("user"), MESSAGE)
    for place in range(len(token_ids) - len(header), -1, -1):
        if token_ids[place] == START and token_ids[place : place + len(header)] == header:
            rest = token_ids[place + len(header) :]
            end = rest.index(END) if END in rest else len(rest)
            return vocabulary().decode(rest[:end])
    return ""
