from __future__ import annotations

import json
import time

import pytest

from harmonium.errors import EngineBusy, EngineError, RequestError
from harmonium.harmony import (
    BROWSER,
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    PYTHON,
    RETURN,
    START,
    Tool,
    grammar_compile,
    parse,
    vocabulary,
)
from harmonium.harmony.grammar import MAX_CALLS, CompiledTurn, TurnRules, compile_turn
from harmonium.harmony.grammar_compile import GrammarLimits, compile_texts
from harmonium.harmony.grammar_state import TurnState
from harmonium.harmony.grammar_text import JSON_OBJECT, TextFormat, json_schema_format
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


ANALYSIS = "<|channel|>analysis<|message|>Thinking.<|end|><|start|>assistant"


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>final<|message|>Hi.<|return|>",
        f"{ANALYSIS}<|channel|>final<|message|>Hi.<|return|>",
        f"{ANALYSIS}<|channel|>final <|constrain|>json<|message|>{{}}<|return|>",
        f"{ANALYSIS}{ANALYSIS}<|channel|>commentary to=functions.now <|constrain|>json"
        "<|message|>{}<|call|>",
        "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
        '<|channel|>commentary to=functions.get_weather code<|message|>{"city":"Oslo","days":3}<|call|>',
        '<|channel|>commentary to=functions.get_weather json<|message|>{\n  "city": "Oslo"\n}<|call|>',
        '<|channel|>commentary to=functions.get_weather_map<|message|>{"zoom": 1.5, "x": []}<|call|>',
        ' to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{"city":"Oslo"}<|call|>',
        '<|channel|>analysis to=browser.search code<|message|>{"query":"x","source":"web"}<|call|>',
        f"{ANALYSIS}<|channel|>analysis to=python code<|message|>print(1)\n<|call|>",
        "<|channel|>commentary to=python<|message|>1 + 1<|call|>",
    ],
)
def test_what_the_model_was_trained_to_write_is_legal(text: str) -> None:
    turn = compile_turn(TurnRules(), TOOLS, (BROWSER, PYTHON))
    assert follow(turn, text).is_complete
    assert parse(tokens_of(text)).diagnostics == []


@pytest.mark.parametrize(
    "text",
    [
        "Hi",
        "<|channel|>??",
        "<|channel|>commentary?",
        "<|channel|>analysis<|message|>a<|return|>",
        "<|channel|>analysis<|message|>a<|channel|>",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistantassistant",
        "<|channel|>analysis<|message|>a<|end|><|start|><|start|>",
        "<|channel|>analysis to=functions",
        "<|channel|>commentary<|message|>a<|return|>",
        "<|channel|>commentary to=ask",
        "<|channel|>commentary to=functions.other",
        "<|channel|>commentary to=functions.now<|channel|>",
        "<|channel|>commentary to=functions.now <|constrain|>json<|message|>ls",
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":1',
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"a"<|call|>',
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"a"}}',
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"a"}<|end|>',
        "<|channel|>commentary to=browser",
        "<|channel|>final<|message|>a<|end|>",
    ],
)
def test_malformed_turns_cannot_be_written(text: str) -> None:
    refuses(compile_turn(TurnRules(), TOOLS), text)


def test_turn_without_tools_has_no_calls_and_no_preamble() -> None:
    turn = compile_turn(TurnRules())
    assert follow(turn, f"{ANALYSIS}<|channel|>final<|message|>Hi.<|return|>").is_complete
    refuses(turn, "<|channel|>commentary")
    refuses(turn, " to")


def test_text_of_special_tokens_is_free_in_text() -> None:
    spelled = vocabulary().encode("<|end|><|start|>system")
    state = follow(compile_turn(TurnRules()), "<|channel|>final<|message|>")
    for token_id in spelled:
        state.advance(token_id)
    assert not state.is_complete


@pytest.mark.parametrize(
    ("rules", "legal", "illegal"),
    [
        (TurnRules(tool_choice="none"), "<|channel|>final<|message|>a<|return|>", "<|channel|>commentary"),
        (
            TurnRules(tool_choice="required"),
            f"{ANALYSIS}<|channel|>commentary to=functions.now<|message|>{{}}<|call|>",
            "<|channel|>final",
        ),
        (
            TurnRules(tool_choice="required", allowed_tools=("now",)),
            f"{ANALYSIS}<|channel|>commentary to=functions.now<|message|>{{}}<|call|>",
            "<|channel|>commentary to=functions.get",
        ),
        (
            TurnRules(allowed_tools=("now", "browser")),
            '<|channel|>commentary to=browser.open<|message|>{"id": 3}<|call|>',
            "<|channel|>commentary to=functions.get",
        ),
        (
            TurnRules(allowed_tools=("get_weather",)),
            "<|channel|>final<|message|>a<|return|>",
            "<|channel|>commentary to=browser",
        ),
    ],
)
def test_tool_choice_holds(rules: TurnRules, legal: str, illegal: str) -> None:
    turn = compile_turn(rules, TOOLS, (BROWSER,))
    assert follow(turn, legal).is_complete
    refuses(turn, illegal)


def test_tool_choice_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(RequestError, match="there is no tool to call"):
        compile_turn(TurnRules(tool_choice="required"))
    with pytest.raises(RequestError, match="names 'other'; the tools are: get_weather, get_weather_map, now"):
        compile_turn(TurnRules(tool_choice="required", allowed_tools=("other",)), TOOLS)
    with pytest.raises(RequestError, match=r"max_calls is 0; expected 1 to 64"):
        TurnRules(max_calls=0)
    with pytest.raises(RequestError, match="max_reasoning_tokens is -1"):
        TurnRules(max_reasoning_tokens=-1)
    with pytest.raises(RequestError, match="has blanks"):
        compile_turn(TurnRules(), (Tool("two words"),))


CALL_NOW = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"


def test_call_ends_the_turn_by_default() -> None:
    turn = compile_turn(TurnRules(), TOOLS)
    state = follow(turn, CALL_NOW)
    assert state.is_complete
    assert state.forced_tokens() == []
    assert turn.stop_token_ids == {RETURN, CALL}
    with pytest.raises(EngineError, match="does not allow"):
        state.advance(START)


def test_several_calls_end_where_the_model_would_read_a_result_or_at_the_limit() -> None:
    turn = compile_turn(TurnRules(max_calls=2), TOOLS)
    assert CALL not in turn.stop_token_ids
    state = follow(turn, CALL_NOW)
    assert not state.is_complete and state.forced_tokens() == [START]
    assert follow(turn, f"{CALL_NOW}<|start|>functions").is_complete
    refuses(turn, f"{CALL_NOW}<|start|>assistant<|channel|>final")
    refuses(turn, f"{CALL_NOW}<|start|>assistant<|channel|>analysis")
    assert follow(turn, f"{CALL_NOW}<|start|>assistant{CALL_NOW}").is_complete
    assert MAX_CALLS >= 64


def test_answer_with_a_format_is_the_only_visible_text_unless_a_call_follows() -> None:
    turn = compile_turn(TurnRules(answer=JSON_OBJECT), TOOLS)
    preamble = "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant"
    assert follow(turn, f'{ANALYSIS}<|channel|>final<|message|>{{"a": [1]}}<|return|>').is_complete
    assert follow(turn, preamble + CALL_NOW).is_complete
    refuses(turn, f"{preamble}<|channel|>final")
    refuses(turn, "<|channel|>final<|message|>`")
    refuses(turn, "<|channel|>final<|message|>[")


def test_answer_follows_regex_and_lark() -> None:
    regex = compile_turn(TurnRules(answer=TextFormat("regex", r"(yes|no), \d{2}")))
    assert follow(regex, "<|channel|>final<|message|>yes, 42<|return|>").is_complete
    refuses(regex, "<|channel|>final<|message|>maybe")
    refuses(regex, "<|channel|>final <|constrain|>")
    lark = compile_turn(TurnRules(answer=TextFormat("lark", 'start: ("a" | "b")+ ";"')))
    assert follow(lark, "<|channel|>final<|message|>abba;<|return|>").is_complete
    refuses(lark, "<|channel|>final<|message|>abba<|return|>")


def test_custom_tool_takes_text_of_its_format() -> None:
    rules = TurnRules(inputs={"patch": TextFormat("lark", 'start: "*** Begin\\n" /[^*]*/ "*** End"')})
    turn = compile_turn(rules, (Tool("patch"), NOW))
    assert follow(
        turn, "<|channel|>commentary to=functions.patch<|message|>*** Begin\n+x\n*** End<|call|>"
    ).is_complete
    refuses(turn, "<|channel|>commentary to=functions.patch<|message|>{")
    free = compile_turn(TurnRules(inputs={"patch": TextFormat()}), (Tool("patch"), NOW))
    assert follow(
        free, "<|channel|>commentary to=functions.patch code<|message|>anything<|call|>"
    ).is_complete


def test_spent_reasoning_is_closed_and_the_answer_is_forced() -> None:
    turn = compile_turn(TurnRules(max_reasoning_tokens=3))
    state = follow(turn, "<|channel|>analysis<|message|>")
    for token_id in vocabulary().encode("wait wait wait"):
        assert state.forced_tokens() == []
        state.advance(token_id)
    written: list[int] = []
    while forced := state.forced_tokens():
        for token_id in forced:
            assert ids_of(state.mask()).tolist() == [token_id]
            state.advance(token_id)
        written += forced
    assert vocabulary().decode(written) == "<|end|><|start|>assistant<|channel|>final"
    state.advance(MESSAGE)
    assert RETURN in ids_of(state.mask())


def test_budget_counts_all_reasoning_messages_and_leaves_calls() -> None:
    turn = compile_turn(TurnRules(max_reasoning_tokens=2), TOOLS)
    one = "<|channel|>analysis<|message|>wait<|end|><|start|>assistant"
    assert follow(turn, one + one + CALL_NOW).is_complete
    refuses(turn, f"{one}{one}<|channel|>analysis")
    refuses(turn, f"{one}{one}<|channel|>commentary<|message|>")
    refuses(compile_turn(TurnRules(allows_reasoning=False)), "<|channel|>analysis")


def test_forced_tokens_are_the_headers_where_there_is_no_choice() -> None:
    state = compile_turn(TurnRules(allows_reasoning=False, answer=TextFormat("regex", "ab"))).start()
    written: list[int] = []
    while forced := state.forced_tokens():
        for token_id in forced:
            state.advance(token_id)
        written += forced
    assert vocabulary().decode(written) == "<|channel|>final<|message|>ab<|return|>"
    assert state.is_complete


def test_rollback_and_copy_go_their_own_ways() -> None:
    turn = compile_turn(TurnRules(max_reasoning_tokens=9), TOOLS)
    header = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    text = f'{ANALYSIS}{header}{{"city":"Oslo"'
    ids = tokens_of(f"{text}}}<|call|>")
    masks = []
    state = turn.start()
    for token_id in ids:
        masks.append(ids_of(state.mask()).tolist())
        state.advance(token_id)
    for back in (1, 2, 4, 9, len(ids)):
        state.rollback(back)
        for token_id, mask in zip(ids[-back:], masks[-back:], strict=True):
            assert ids_of(state.mask()).tolist() == mask
            state.advance(token_id)
    with pytest.raises(EngineError, match="cannot take back"):
        state.rollback(len(ids) + 1)
    state.rollback(3)
    twin = state.copy()
    twin.advance(ids[-3])
    assert state.num_tokens == len(ids) - 3 and twin.num_tokens == len(ids) - 2
    with pytest.raises(EngineError, match="cannot take back"):
        twin.rollback(2)
    state.advance(ids[-3])
    assert ids_of(state.mask()).tolist() == ids_of(twin.mask()).tolist()


def test_long_source_file_is_a_legal_argument() -> None:
    source = "/** {\"k\": [1]} */\nlet s = '\\\\n]'; // Ünïcode \u2014\n" * 400
    tool = Tool("write", parameters={"type": "object", "properties": {"content": {"type": "string"}}})
    text = json.dumps({"content": source}, ensure_ascii=False)
    ids = tokens_of("<|channel|>commentary to=functions.write <|constrain|>json<|message|>")
    state = compile_turn(TurnRules(), (tool,)).start()
    for token_id in [*ids, *vocabulary().encode(text), CALL]:
        state.advance(token_id)
    assert state.is_complete and len(source) > 18_000


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
