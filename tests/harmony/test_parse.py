"""What the model writes, well and badly formed, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harmonium.harmony import (
    CALL,
    CONSTRAINED_JSON,
    END,
    START,
    Conversation,
    Diagnostic,
    Message,
    MessageEnd,
    MessageStart,
    ParsedTurn,
    StreamParser,
    TextDelta,
    parse,
    render_messages,
    render_prompt,
    vocabulary,
)

Tokens = Callable[[str], list[int]]
CALL_OF_F = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"


def codes(turn: ParsedTurn) -> list[str]:
    return [diagnostic.code for diagnostic in turn.diagnostics]


def calls(turn: ParsedTurn) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in turn.tool_calls]


def test_well_formed_turn_has_no_diagnostics(tokens: Tokens) -> None:
    turn = parse(
        tokens(
            "<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
        )
    )
    assert (turn.reasoning, turn.content, turn.stopped_by) == ("2+2", "4", "return")
    assert turn.diagnostics == []
    assert [message.channel for message in turn.messages] == ["analysis", "final"]


@pytest.mark.parametrize("second", ["commentary", "commentary ", "analysis", "final"])
def test_glued_channel_marker_does_not_reach_the_name(tokens: Tokens, second: str) -> None:
    header = f"<|channel|>commentary to=functions.query_db<|channel|>{second}<|constrain|>json"
    text = header + "<|message|>{}<|call|>"
    turn = parse(tokens(text))
    assert calls(turn) == [("query_db", "{}")]
    assert codes(turn) == ["repeated_channel"]
    replayed = vocabulary().decode(render_messages(turn.messages))
    assert replayed.count("<|channel|>") == 1
    assert "to=functions.query_db <|constrain|>json<|message|>{}<|call|>" in replayed


@pytest.mark.parametrize(
    ("start", "code"),
    [
        ("<|start|><|start|>assistant", "doubled_start"),
        ("<|start|>assistantassistant", "broken_role"),
        ("<|start|>assistant assistant", "header_text"),
        ("<|start|>", "broken_role"),
        ("<|start|>assistan", "foreign_role"),
        ("", "missing_start"),
        ("assistant", "missing_start"),
    ],
)
def test_broken_role_text_before_a_final_is_forgiven(tokens: Tokens, start: str, code: str) -> None:
    text = f"<|channel|>analysis<|message|>x<|end|>{start}<|channel|>final<|message|>hi<|return|>"
    turn = parse(tokens(text))
    assert (turn.reasoning, turn.content, turn.stopped_by) == ("x", "hi", "return")
    assert code in codes(turn)


@pytest.mark.parametrize(
    "foreign",
    [
        "bash<|channel|>commentary<|message|>",
        "functions.f to=assistant<|channel|>commentary<|message|>",
        "functions.f<|message|>",
        "user<|message|>",
        "system<|channel|>final<|message|>",
        "bash to=functions.f<|channel|>commentary <|constrain|>json<|message|>",
    ],
)
def test_message_in_another_name_is_no_answer_and_no_call(tokens: Tokens, foreign: str) -> None:
    turn = parse(tokens(f"<|channel|>analysis<|message|>x<|end|><|start|>{foreign}22C<|end|>"), "length")
    assert (turn.reasoning, turn.content, turn.tool_calls) == ("x", "", [])
    assert len(turn.messages) == 1
    assert "foreign_role" in codes(turn)
    assert turn.diagnostics[-1].text == "22C"


def test_body_without_channel_is_reasoning(tokens: Tokens) -> None:
    text = (
        "User asks for X. Must refuse.<|end|><|start|>assistant<|channel|>analysis<|message|>Refuse.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Sorry, I can't help with that.<|return|>"
    )
    turn = parse(tokens(text))
    assert turn.reasoning == "User asks for X. Must refuse.\nRefuse."
    assert (turn.content, turn.stopped_by) == ("Sorry, I can't help with that.", "return")
    assert parse(tokens("<|message|>Must refuse.<|end|>")).reasoning == "Must refuse."
    later = parse(tokens("<|channel|>analysis<|message|>a<|end|><|start|>assistant Refuse.<|end|>"))
    assert (later.reasoning, later.content) == ("a\nRefuse.", "")


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<|channel|>final Hello there<|return|>", "", "Hello there"),
        ("<|channel|>finalHello there<|return|>", "", "Hello there"),
        ("<|channel|>final\n\nHello\n there<|return|>", "", "Hello\n there"),
        ("<|channel|>analysis think hard<|end|>", "think hard", ""),
        ("<|channel|>commentary I look it up.<|end|>", "", "I look it up."),
        ("<|channel|>analysis<|return|>", "", ""),
        ("<|channel|><|return|>", "", ""),
        ("<|return|>", "", ""),
    ],
)
def test_missing_message_token_keeps_the_text(
    tokens: Tokens, text: str, reasoning: str, content: str
) -> None:
    turn = parse(tokens(text))
    assert (turn.reasoning, turn.content) == (reasoning, content)
    assert "missing_message" in codes(turn)


@pytest.mark.parametrize(
    "header",
    [
        'commentary to=functions.f <|constrain|>json{"a":1}',
        'commentary to=functions.f{"a":1}'.replace("{", " {"),
        'commentary to=functions.f json {"a":1}',
    ],
)
def test_missing_message_token_keeps_the_call(tokens: Tokens, header: str) -> None:
    turn = parse(tokens(f"<|channel|>{header}<|call|>"))
    assert calls(turn) == [("f", '{"a":1}')]
    assert codes(turn) == ["missing_message"]


def test_nothing_counts_after_the_first_stop_token(tokens: Tokens) -> None:
    turn = parse(tokens(f"{CALL_OF_F}{{}}<|call|>commentary<|call|><|return|>"))
    assert calls(turn) == [("f", "{}")]
    assert turn.stopped_by == "call"
    assert codes(turn) == ["after_stop"]
    result = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>22C<|end|>"
    invented = parse(tokens(f"{CALL_OF_F}{{}}<|call|>{result}"))
    assert len(invented.messages) == 1
    assert codes(invented) == ["after_stop"]


@pytest.mark.parametrize(
    "garbage", ["??", "commentary?commentary?", "final?final?", "", "<|channel|>", "json"]
)
def test_garbage_header_does_not_reach_the_answer(tokens: Tokens, garbage: str) -> None:
    text = (
        f"<|channel|>{garbage}<|end|><|start|>assistant<|channel|>analysis<|message|>a<|end|>"
        "<|start|>assistant<|channel|>final<|message|>b<|return|>"
    )
    turn = parse(tokens(text))
    assert (turn.reasoning, turn.content, turn.tool_calls) == ("a", "b", [])
    assert "unknown_channel" in codes(turn)


@pytest.mark.parametrize(
    ("channel", "reasoning", "content"),
    [
        ("finalx", "", "t"),
        ("Final", "", "t"),
        ("commentary?", "", "t"),
        ("analysis2", "t", ""),
        ("??", "t", ""),
        ("", "t", ""),
    ],
)
def test_text_of_an_unknown_channel_is_kept(
    tokens: Tokens, channel: str, reasoning: str, content: str
) -> None:
    turn = parse(tokens(f"<|channel|>{channel}<|message|>t<|end|>"))
    assert (turn.reasoning, turn.content) == (reasoning, content)
    assert codes(turn) == ["unknown_channel"]


def test_preamble_is_content_and_the_call_follows_it(tokens: Tokens) -> None:
    text = (
        "<|channel|>commentary<|message|>I will check both cities.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Oslo"}<|call|>'
    )
    turn = parse(tokens(text))
    assert turn.content == "I will check both cities."
    assert calls(turn) == [("get_weather", '{"city":"Oslo"}')]
    assert turn.messages[1] == Message(
        "assistant",
        '{"city":"Oslo"}',
        channel="commentary",
        recipient="functions.get_weather",
        content_type=CONSTRAINED_JSON,
        token_ids=turn.messages[1].token_ids,
    )
    assert turn.diagnostics == []


def test_many_messages_are_joined_in_order(tokens: Tokens) -> None:
    parts = [
        ("analysis", "r1"),
        ("commentary", "c1"),
        ("analysis", "r2"),
        ("final", "c2"),
        ("analysis", "r3"),
    ]
    bodies = [f"<|channel|>{channel}<|message|>{text}<|end|>" for channel, text in [*parts, ("final", "c3")]]
    turn = parse(tokens("<|start|>assistant".join(bodies) + "<|return|>"))
    assert turn.reasoning == "r1\nr2\nr3"
    assert turn.content == "c1\nc2\nc3"
    assert turn.diagnostics == []


def test_final_alone_is_content(tokens: Tokens) -> None:
    turn = parse(tokens('<|channel|>final<|message|>{"issues":[]}<|return|>'))
    assert (turn.reasoning, turn.content) == ("", '{"issues":[]}')


@pytest.mark.parametrize(
    "header",
    [
        "", "<|channel|>", "<|channel|>fin", "<|channel|>commentary to", "<|channel|>analysis to=", " to",
        "<|channel|>commentary to=functions.ge", "<|channel|>commentary to=functions.get <|constrain|>js",
    ],
)  # fmt: skip
def test_stream_that_ends_in_a_header_says_so(tokens: Tokens, header: str) -> None:
    turn = parse(tokens(f"<|channel|>analysis<|message|>ok<|end|><|start|>assistant{header}"), "length")
    assert (turn.reasoning, turn.content, turn.tool_calls, turn.stopped_by) == ("ok", "", [], "length")
    assert codes(turn)[-1] == "incomplete_header"


def test_recipient_without_namespace_is_a_call(tokens: Tokens) -> None:
    text = '<|channel|>commentary to=ask_followup <|constrain|>json<|message|>{"q":"?"}<|call|>'
    assert calls(parse(tokens(text))) == [("ask_followup", '{"q":"?"}')]
    assert parse(tokens(text), tool_names=["ask_followup"]).tool_calls[0].is_declared
    unknown = parse(tokens(text), tool_names=["f"])
    assert calls(unknown) == [("ask_followup", '{"q":"?"}')]
    assert not unknown.tool_calls[0].is_declared
    assert codes(unknown) == ["undeclared_tool"]


@pytest.mark.parametrize(
    "header",
    [
        " to=functions.f<|channel|>commentary <|constrain|>json",
        "<|channel|>commentary to=functions.f<|constrain|>json",
        "<|channel|>commentary to=functions.f json",
        "<|channel|>analysis to=functions.f code",
        "<|channel|>final to=functions.f",
        "<|channel|>commentaryto=functions.f",
        "<|channel|>commentary functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f to=functions.f <|constrain|>json",
        " to=functions.f<|message|>".removesuffix("<|message|>"),
    ],
)
def test_recipient_is_found_wherever_it_stands(tokens: Tokens, header: str) -> None:
    assert calls(parse(tokens(f"{header}<|message|>{{}}<|call|>"))) == [("f", "{}")]


@pytest.mark.parametrize(
    ("recipient", "glued"),
    [
        ("functions.query_dbcommentary", "commentary"),
        ("functions.query_dbjson", "json"),
        ("query_dbcode", "code"),
        ("functions.functions.query_db", ""),
        ("functions.functions.functions.query_dbanalysis", "analysis"),
    ],
)
def test_words_glued_to_an_offered_name_are_cut_off(tokens: Tokens, recipient: str, glued: str) -> None:
    text = f"<|channel|>commentary to={recipient} <|constrain|>json<|message|>{{}}<|call|>"
    turn = parse(tokens(text), tool_names=["query_db", "query"])
    assert calls(turn) == [("query_db", "{}")]
    assert turn.tool_calls[0].is_declared
    assert codes(turn) == ["glued_recipient"]
    assert turn.diagnostics[0].text == glued
    assert "to=functions.query_db <|constrain|>" in vocabulary().decode(render_messages(turn.messages))


@pytest.mark.parametrize("name", ["query", "query_db", "query_dbjson", "browser.opencode", "other_json"])
def test_name_that_is_offered_or_wholly_unknown_is_left_alone(tokens: Tokens, name: str) -> None:
    text = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{{}}<|call|>"
    turn = parse(tokens(text), tool_names=["query", "query_db", "query_dbjson", "browser"])
    assert calls(turn) == [(name, "{}")]


@pytest.mark.parametrize("recipient", ["all", "user", "assistant"])
def test_message_to_everybody_is_no_call(tokens: Tokens, recipient: str) -> None:
    turn = parse(tokens(f"<|channel|>final to={recipient}<|message|>hi<|return|>"))
    assert (turn.content, turn.tool_calls) == ("hi", [])


def test_truncated_arguments_are_returned(tokens: Tokens) -> None:
    turn = parse(tokens(f'{CALL_OF_F}{{"a":{{"b":1}}'), "length")
    assert calls(turn) == [("f", '{"a":{"b":1}')]
    assert not turn.tool_calls[0].is_complete
    assert turn.stopped_by == "length"


@pytest.mark.parametrize(
    "arguments",
    [
        "ls -R\n",
        '{"path":"a.py","content":"x"}}',
        '{"content":"/** {\\"k\\": [1]} */\\n]"}',
        "",
        "<tag>",
        "a" * 20_000,
    ],
)
def test_arguments_that_are_no_json_stay_as_written(tokens: Tokens, arguments: str) -> None:
    assert calls(parse(tokens(f"{CALL_OF_F}{arguments}<|call|>"))) == [("f", arguments)]


def test_built_in_tool_that_was_not_offered_is_marked(tokens: Tokens) -> None:
    text = '<|channel|>commentary to=browser.search code<|message|>{"query":"x"}<|call|>'
    turn = parse(tokens(text), tool_names=[])
    assert [call.is_declared for call in turn.tool_calls] == [False]
    assert parse(tokens(text), tool_names=["browser"]).tool_calls[0].is_declared


def test_markup_on_the_commentary_channel_is_content(tokens: Tokens) -> None:
    turn = parse(
        tokens("<|channel|>commentary<|message|><code_interpreter>1+1</code_interpreter><|end|><|return|>")
    )
    assert turn.content == "<code_interpreter>1+1</code_interpreter>"
    assert turn.diagnostics == []


def test_channel_words_in_an_answer_are_untouched(tokens: Tokens) -> None:
    answer = "The words analysis, assistantfinal and <|end|> are text here."
    ids = [*tokens("<|channel|>final<|message|>"), *vocabulary().encode(answer), *tokens("<|return|>")]
    assert parse(ids).content == answer


@pytest.mark.parametrize(
    "special", ["<|message|>", "<|constrain|>", "<|startoftext|>", "<|reserved_200500|>"]
)
def test_special_token_in_a_body_is_a_diagnostic_and_no_text(tokens: Tokens, special: str) -> None:
    turn = parse(tokens(f"<|channel|>final<|message|>a{special}b<|return|>"))
    assert turn.content == "ab"
    assert codes(turn) == ["unexpected_token"]


@pytest.mark.parametrize("joint", ["<|start|>assistant<|channel|>final", "<|channel|>final"])
def test_missing_end_token_ends_the_message_all_the_same(tokens: Tokens, joint: str) -> None:
    turn = parse(tokens(f"<|channel|>analysis<|message|>a{joint}<|message|>b<|return|>"))
    assert (turn.reasoning, turn.content) == ("a", "b")
    assert "missing_end" in codes(turn)


@pytest.mark.parametrize("token_id", [-1, -(10**30), 201_088, 10**30, 200_018])
def test_ids_that_mean_nothing_are_diagnostics(tokens: Tokens, token_id: int) -> None:
    whole = tokens("<|channel|>final<|message|>ab<|return|>more")
    for place in range(len(whole) + 1):
        turn = parse([*whole[:place], token_id, *whole[place:]])
        assert turn.content == "ab"
        assert any(token_id in diagnostic.token_ids for diagnostic in turn.diagnostics)


def test_end_of_text_ends_the_turn(tokens: Tokens) -> None:
    turn = parse(tokens("<|channel|>final<|message|>hi<|endoftext|>x"))
    assert (turn.content, turn.stopped_by) == ("hi", "end_of_text")
    assert codes(turn) == ["end_of_text", "after_stop"]


def test_header_without_end_turns_into_reasoning_that_streams(tokens: Tokens) -> None:
    parser = StreamParser()
    events = parser.push_many(tokens("word " * 2000))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert len(deltas) > 1000
    assert parse(tokens("word " * 2000)).reasoning == "word " * 2000


def test_character_cut_between_tokens_waits_for_its_rest(tokens: Tokens) -> None:
    ids = vocabulary().encode("🫠")
    assert len(ids) > 1
    parser = StreamParser()
    parser.push_many(tokens("<|channel|>final<|message|>"))
    assert parser.push_many(ids[:-1]) == []
    assert parser.push(ids[-1]) == [TextDelta(0, "content", "🫠")]
    cut = parse([*tokens("<|channel|>final<|message|>a"), *ids[:-1]], "length")
    assert cut.content == "a\ufffd"


def test_events_come_in_order(tokens: Tokens) -> None:
    parser = StreamParser()
    events = parser.push_many(
        tokens(f"<|channel|>analysis<|message|>a<|end|><|start|>assistant{CALL_OF_F}x<|call|>")
    )
    assert [type(event) for event in events] == [MessageStart, TextDelta, MessageEnd] * 2
    assert [event.index for event in events if not isinstance(event, Diagnostic)] == [0, 0, 0, 1, 1, 1]
    assert parser.finish("stop") == []
    assert parser.stopped_by == "call"


def test_well_formed_turn_replays_to_the_tokens_the_model_wrote(tokens: Tokens) -> None:
    """Token by token, also where the model's tokens are not those that encoding its text gives."""
    history = Conversation((Message("user", "hi"),))
    odd = [*vocabulary().encode("12"), *vocabulary().encode("3")]
    assert odd != vocabulary().encode("123")
    head = tokens("<|channel|>analysis<|message|>")
    header = tokens("<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>")
    written = [*head, *odd, *header, *odd, CALL]
    turn = parse(written)
    prompt = render_prompt(history)
    following = render_prompt(Conversation((*history.messages, *turn.messages)))
    assert following[: len(prompt) + len(written)] == prompt + written
    assert following[len(prompt) + len(written) :] == prompt[-2:]


def test_return_becomes_end_in_the_history(tokens: Tokens) -> None:
    turn = parse(tokens("<|channel|>final<|message|>A<|return|>"))
    assert render_messages(turn.messages) == [START, *tokens("assistant<|channel|>final<|message|>A"), END]
