"""What the grammar of a turn cannot enforce, and how large it may be."""

from __future__ import annotations

import time

import pytest

from harmonium.errors import EngineBusy, RequestError
from harmonium.harmony import (
    Tool,
    grammar_compile,
)
from harmonium.harmony.grammar import TurnRules, compile_turn
from harmonium.harmony.grammar_compile import GrammarLimits, compile_texts
from harmonium.harmony.grammar_text import JSON_OBJECT, TextFormat, json_schema_format
from tests.harmony.followed_turns import WEATHER, follow, refuses


def test_schema_that_cannot_be_enforced_is_refused_when_strict_and_warned_of_otherwise() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": True}},
        "required": ["a"],
    }
    with pytest.raises(RequestError, match=r"the response format: .*uniqueItems"):
        compile_turn(TurnRules(answer=json_schema_format(schema, "schema", is_strict=True)))
    loose = compile_turn(TurnRules(answer=json_schema_format(schema, "schema", is_strict=False)))
    assert [warning.keywords for warning in loose.warnings] == [("uniqueItems",)]
    tool = Tool("f", parameters=schema)
    warned = compile_turn(TurnRules(), (tool,))
    assert [(warning.subject, warning.keywords) for warning in warned.warnings] == [
        ("tool 'f'", ("uniqueItems",))
    ]
    assert "uniqueItems not enforced" in str(warned.warnings[0])
    start = "<|channel|>commentary to=functions.f<|message|>"
    assert follow(warned, f'{start}{{"a":[1,1]}}<|call|>').is_complete
    refuses(warned, f'{start}{{"a":"')
    with pytest.raises(RequestError, match=r"tool 'f': .*uniqueItems"):
        compile_turn(TurnRules(strict_tools=frozenset({"f"})), (tool,))
    assert compile_turn(TurnRules(tool_choice="none", strict_tools=frozenset({"f"})), (tool,)).warnings == ()


def test_tool_whose_schema_makes_no_sense_takes_any_object() -> None:
    turn = compile_turn(TurnRules(), (Tool("f", parameters={"$ref": "#/$defs/none"}),))
    assert [str(warning).split("(")[0] for warning in turn.warnings] == ["tool 'f': the schema not enforced "]
    start = "<|channel|>commentary to=functions.f<|message|>"
    assert follow(turn, f'{start}{{"x":{{"y":[null]}}}}<|call|>').is_complete
    refuses(turn, f"{start}[")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (TextFormat("regex", "["), "unclosed character class"),
        (TextFormat("regex", r"a(?=b)"), "look-around"),
        (TextFormat("regex", "x{1,20000}"), "a repetition counts to 20000; the limit is 10,000"),
        (TextFormat("lark", "start: foo"), "unknown name"),
        (TextFormat("lark", "start: start"), "nothing satisfies it"),
        (TextFormat("lark", 'start: "a" <|call|>'), "names special tokens"),
        (TextFormat("lark", 'start: "a" <[200012]>'), "names special tokens"),
        (
            json_schema_format({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "s"),
            "nothing satisfies",
        ),
        (json_schema_format({"type": "string", "pattern": "^a$", "minLength": 5}, "s"), "Unsatisfiable"),
        (json_schema_format({"$ref": "https://example.com/s.json"}, "s"), "cannot be enforced"),
        (json_schema_format({"enum": [f"value {i}" for i in range(30_000)]}, "s"), "the limit is 262,144"),
    ],
)
def test_answer_format_that_cannot_be_enforced_is_refused(form: TextFormat, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        compile_turn(TurnRules(answer=form))


def test_schema_that_is_no_json_schema_is_refused() -> None:
    with pytest.raises(RequestError, match="schema is a list; expected a JSON schema"):
        json_schema_format([], "schema")
    with pytest.raises(RequestError, match="schema is not JSON"):
        json_schema_format({"const": float("nan")}, "schema")
    with pytest.raises(RequestError, match="schema is not JSON"):
        json_schema_format({"const": {1, 2}}, "schema")
    nested: dict[str, object] = {"type": "string"}
    for _ in range(100_000):
        nested = {"items": nested}
    with pytest.raises(RequestError, match="nested too deeply"):
        json_schema_format(nested, "schema")


def test_deep_schema_is_refused_without_harm() -> None:
    nested: dict[str, object] = {"type": "string"}
    for _ in range(150):
        nested = {"items": nested}
    with pytest.raises(RequestError, match="recursion limit"):
        compile_turn(TurnRules(answer=json_schema_format(nested, "schema")))


def test_compilation_has_a_deadline_that_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()
    end = time.monotonic() + 30

    def build(form: object) -> None:
        while not release.is_set() and time.monotonic() < end:
            pass  # the limit is of processor time

    monkeypatch.setattr(grammar_compile, "_build", build)
    slow = {f"tool {i}": TextFormat("regex", f"deadline {i}") for i in range(2)}
    busy = {"tool 'c'": TextFormat("regex", "deadline 2")}
    try:
        with pytest.raises(RequestError, match=r"takes more than 0.05 s"):
            compile_texts(slow, GrammarLimits(compile_seconds=0.05))
        with pytest.raises(EngineBusy, match="are busy"):  # both threads still work on the slow ones
            compile_texts(busy, GrammarLimits(compile_seconds=0.05))
    finally:
        release.set()


@pytest.mark.parametrize(("count", "is_taken"), [(500, True), (1500, False)])
def test_object_of_too_many_optional_properties_is_refused_before_it_is_begun(
    count: int, is_taken: bool
) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}
    rules = TurnRules(answer=json_schema_format(schema, "schema"), allows_reasoning=False)
    if is_taken:
        follow(compile_turn(rules), '<|channel|>final<|message|>{"p3":"x","p499":"y"}<|return|>')
    else:
        with pytest.raises(RequestError, match="items"):
            compile_turn(rules)


def test_thousand_alternatives_are_followed() -> None:
    alternatives = [
        {"type": "object", "properties": {"k": {"const": i}, "v": {"type": "string"}}, "required": ["k", "v"]}
        for i in range(1000)
    ]
    turn = compile_turn(
        TurnRules(answer=json_schema_format({"anyOf": alternatives}, "schema"), allows_reasoning=False)
    )
    assert follow(turn, '<|channel|>final<|message|>{"k":999,"v":"x"}<|return|>').is_complete


def test_size_limit_names_both_numbers() -> None:
    limits = GrammarLimits(max_definition_bytes=10)
    with pytest.raises(RequestError, match=r"tool 'get_weather': its grammar has \d+ bytes; the limit is 10"):
        compile_turn(TurnRules(), (WEATHER,), limits=limits)


def test_cache_is_bounded_in_entries_and_bytes() -> None:
    cache = grammar_compile._Cache(max_entries=2, max_bytes=10)
    compiled = compile_texts({"x": JSON_OBJECT})["x"]
    forms = [TextFormat("regex", text) for text in ("aaa", "bbb", "ccc", "d" * 9)]
    for form in forms[:3]:
        cache.put(form, compiled)
    assert [cache.get(form) is not None for form in forms[:3]] == [False, True, True]
    cache.get(forms[1])
    cache.put(forms[3], compiled)
    assert len(cache) == 1 and cache.get(forms[3]) is compiled
    assert compile_texts({"y": JSON_OBJECT})["y"] is compiled
