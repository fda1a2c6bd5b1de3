"""What the grammar promises, on turns and documents drawn from its masks alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from harmonium.harmony import (
    BROWSER,
    CALL,
    MESSAGE,
    NUM_TEXT_TOKENS,
    PYTHON,
    RETURN,
    START,
    parse,
    vocabulary,
)
from harmonium.harmony.grammar import TurnRules, compile_turn
from harmonium.harmony.grammar_text import TextFormat, json_schema_format
from tests.harmony.followed_turns import PERSON, TOOLS, WEATHER, WEATHER_MAP
from tests.harmony.random_turns import walk

ALL_NAMES = [tool.name for tool in TOOLS] + ["browser", "python"]
SCHEMAS = {
    "get_weather": WEATHER.parameters,
    "get_weather_map": WEATHER_MAP.parameters,
    "now": {"type": "object"},
}


def check_turn(seed: int) -> None:
    """Write a random turn under random rules; everything about it must hold."""
    rng = random.Random(seed)
    answer: TextFormat = rng.choice([TextFormat(), json_schema_format(PERSON, "schema")])
    rules = TurnRules(
        tool_choice=rng.choice(["auto", "auto", "none", "required"]),
        allowed_tools=rng.choice([None, None, ("get_weather",), ("now", "python")]),
        max_calls=rng.choice([1, 1, 3]),
        answer=answer,
        max_reasoning_tokens=rng.choice([None, 0, 5]),
    )
    state = compile_turn(rules, TOOLS, (BROWSER, PYTHON)).start()
    ids = walk(state, rng)
    assert state.is_complete, vocabulary().decode(ids)
    for part in split_calls(ids):
        check_parsed(part, rules, seed)


def split_calls(ids: Sequence[int]) -> list[list[int]]:
    """The turn cut behind each <|call|>, as `chat` reads it; what opens a tool's message is left out."""
    parts: list[list[int]] = [[]]
    assistant = vocabulary().encode("assistant")
    for token_id in ids:
        if parts[-1] and parts[-1][-1] == CALL:
            parts.append([])
        parts[-1].append(token_id)
    parts = [part[1 + len(assistant) :] if part[0] == START else part for part in parts if len(part) != 2]
    assert all(part[-1] in (CALL, RETURN) for part in parts)
    return parts


def check_parsed(ids: Sequence[int], rules: TurnRules, seed: int) -> None:
    turn = parse(ids, tool_names=ALL_NAMES)
    assert turn.diagnostics == [], (seed, turn.diagnostics)
    assert len(turn.tool_calls) == (turn.stopped_by == "call")
    for call in turn.tool_calls:
        assert rules.tool_choice != "none" and call.is_complete and call.is_declared
        assert rules.allowed_tools is None or call.name.split(".")[0] in rules.allowed_tools
        if call.name != "python":
            jsonschema.validate(json.loads(call.arguments), SCHEMAS.get(call.name, {"type": "object"}))
    if not turn.tool_calls:
        assert rules.tool_choice != "required"
        if rules.answer.is_json:
            jsonschema.validate(json.loads(turn.content), PERSON)
    if rules.max_reasoning_tokens == 0:
        assert turn.reasoning == ""


@pytest.mark.parametrize("start", [0, 20, 40])
def test_random_turns_are_legal_and_their_texts_validate(start: int) -> None:
    for seed in range(start, start + 20):
        check_turn(seed)


OWN_SCHEMAS: list[dict[str, object]] = [
    {"type": "object"},
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "patternProperties": {"^x_": {"type": "null"}},
    },
    {"type": "object", "additionalProperties": {"type": "integer", "minimum": -3, "maximum": 3}},
    {"type": "array", "items": {"type": "number", "multipleOf": 0.5}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "string"}], "items": False},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "minLength": 2, "maxLength": 8},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 1000},
    {"type": ["string", "null", "boolean"]},
    {"enum": ["a", 1, None, {"b": [2]}]},
    {"const": {"deep": ["é", "\u2014", "\\", '"', "\n"]}},
    {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}}]},
    {"allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": {"type": "integer"}}}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]},
        ]
    },
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    PERSON,
]


@pytest.mark.parametrize("index", range(len(OWN_SCHEMAS)))
def test_random_documents_validate(index: int) -> None:
    schema = OWN_SCHEMAS[index]
    turn = compile_turn(TurnRules(answer=json_schema_format(schema, "schema"), allows_reasoning=False))
    finished = 0
    for seed in range(4):
        state = turn.start()
        ids = walk(state, random.Random(seed), soft_limit=60, hard_limit=600)
        if state.is_complete:
            finished += 1
            assert all(token_id < NUM_TEXT_TOKENS for token_id in ids[ids.index(MESSAGE) + 1 : -1])
            jsonschema.validate(json.loads(parse(ids).content), schema)
    assert finished, "no draw came to its end"


def test_threads_compile_and_write_at_once() -> None:
    schemas = [
        {"type": "array", "items": {"type": "boolean"}, "maxItems": number % 4} for number in range(16)
    ]

    def write(number: int) -> None:
        turn = compile_turn(
            TurnRules(answer=json_schema_format(schemas[number], "schema"), allows_reasoning=False), TOOLS
        )
        state = turn.start()
        ids = walk(state, random.Random(number), soft_limit=60, hard_limit=600)
        if ids[-1] == RETURN:
            jsonschema.validate(json.loads(parse(ids).content), schemas[number])

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(write, range(16)))) == 16
