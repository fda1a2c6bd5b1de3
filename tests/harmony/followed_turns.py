"""Turns for the tests of the grammar: tools, and text followed token by token."""

from __future__ import annotations

import pytest

from harmonium.errors import EngineError
from harmonium.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Tool, vocabulary
from harmonium.harmony.grammar import CompiledTurn
from harmonium.harmony.grammar_state import TurnState
from tests.harmony.random_turns import ids_of

WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["c", "f"]},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
)
WEATHER_MAP = Tool(
    "get_weather_map",
    parameters={"type": "object", "properties": {"zoom": {"type": "number"}}, "required": ["zoom"]},
)
NOW = Tool("now")
TOOLS = (WEATHER, WEATHER_MAP, NOW)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "age": {"type": ["integer", "null"]},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}

_SPECIAL = {
    "<|call|>": CALL,
    "<|channel|>": CHANNEL,
    "<|constrain|>": CONSTRAIN,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|return|>": RETURN,
    "<|start|>": START,
}


def tokens_of(text: str) -> list[int]:
    """Token ids, with the named special tokens as what they are."""
    ids: list[int] = []
    while text:
        name = next((name for name in _SPECIAL if text.startswith(name)), None)
        if name is not None:
            ids.append(_SPECIAL[name])
            text = text[len(name) :]
            continue
        places = [place for name in _SPECIAL if (place := text.find(name)) >= 0]
        end = min(places, default=len(text))
        ids += vocabulary().encode(text[:end])
        text = text[end:]
    return ids


def follow(turn: CompiledTurn, text: str) -> TurnState:
    """The state after this text, each token of which the mask must allow."""
    state = turn.start()
    for token_id in tokens_of(text):
        assert token_id in ids_of(state.mask()), f"{vocabulary().decode([token_id])!r} is not allowed"
        state.advance(token_id)
    return state


def refuses(turn: CompiledTurn, text: str) -> None:
    """One of the last three tokens of the text must be the first one that is not allowed."""
    ids = tokens_of(text)
    state = turn.start()
    for place, token_id in enumerate(ids):
        if token_id not in ids_of(state.mask()):
            assert place >= len(ids) - 3, f"refused already at {vocabulary().decode(ids[place:])!r}"
            break
        state.advance(token_id)
    else:
        raise AssertionError(f"{text!r} is allowed")
    with pytest.raises(EngineError, match="does not allow"):
        state.advance(token_id)
    assert state.num_tokens == place
