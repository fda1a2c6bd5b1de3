from __future__ import annotations

import json
import pickle
import random

import pytest

from harmonium.errors import EngineError, RequestError
from harmonium.harmony import (
    BROWSER,
    CALL,
    MESSAGE,
    PYTHON,
    RETURN,
    START,
    Tool,
    parse,
    vocabulary,
)
from harmonium.harmony.grammar import MAX_CALLS, PackedTurn, TurnRules, compile_turn
from harmonium.harmony.grammar_text import JSON_OBJECT, TextFormat
from tests.harmony.followed_turns import NOW, TOOLS, follow, refuses, tokens_of
from tests.harmony.random_turns import ids_of, walk

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


@pytest.mark.parametrize(
    "rules",
    [
        TurnRules(),
        TurnRules(tool_choice="required", max_calls=3, max_reasoning_tokens=20),
        TurnRules(answer=JSON_OBJECT, tool_choice="none"),
        TurnRules(inputs={"now": TextFormat("regex", "[a-z]{2,9}")}, allowed_tools=("now", "python")),
    ],
)
def test_a_pickled_turn_has_the_same_masks(rules: TurnRules) -> None:
    turn = compile_turn(rules, TOOLS, (BROWSER, PYTHON))
    tokens = walk(turn.start(), random.Random(7), soft_limit=40)
    packed = pickle.loads(pickle.dumps(turn))
    for again in (packed, pickle.loads(pickle.dumps(packed))):
        first, second = turn.start(), again.start()
        for token_id in tokens:
            assert (first.mask() == second.mask()).all()
            assert first.forced_tokens() == second.forced_tokens()
            first.advance(token_id)
            second.advance(token_id)
        assert second.is_complete is first.is_complete


def test_a_pickled_turn_that_cannot_be_compiled_says_so_at_its_start() -> None:
    turn = compile_turn(TurnRules(answer=JSON_OBJECT))
    packed = PackedTurn((TurnRules(answer=TextFormat("regex", "a{99999}")), (), (), None))
    assert pickle.loads(pickle.dumps(turn)).start().num_tokens == 0
    with pytest.raises(RequestError, match="cannot be enforced"):
        pickle.loads(pickle.dumps(packed)).start()
