"""Prompts, token for token: equal to the Harmony library's but for deviations that each have a test here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonium.errors import HarmonyError
from harmonium.harmony import (
    BROWSER,
    BUILTIN_TOOLS,
    CALL,
    CONSTRAIN,
    CONSTRAINED_JSON,
    END,
    NUM_TEXT_TOKENS,
    PYTHON,
    RETURN,
    Conversation,
    Message,
    ResponseFormat,
    Tool,
    ToolNamespace,
    builtin_tool,
    developer_text,
    parse,
    reasoning_effort,
    render_message,
    render_messages,
    render_prompt,
    render_training,
    system_text,
    vocabulary,
)
from tests.harmony.conversations import (
    EVIL,
    analysis,
    call,
    cases,
    final,
    library_ids,
    preamble,
    result,
    user,
)

Tokens = Callable[[str], list[int]]
CASES = cases()
GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "harmony_renders.json").read_text(encoding="utf-8")
)


def prompt(*messages: Message) -> str:
    """The text of a prompt behind its system message."""
    text = vocabulary().decode(render_prompt(Conversation(messages)))
    return text.split("<|end|>", 1)[1]


def test_golden_file_holds_every_case() -> None:
    assert GOLDEN.keys() == CASES.keys()
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_prompt_equals_the_golden_render(name: str) -> None:
    ids = render_prompt(CASES[name])
    assert vocabulary().decode(ids) == GOLDEN[name]["text"]
    assert hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest() == GOLDEN[name]["ids_sha256"]


def test_prompts_equal_the_library_run_live() -> None:
    oss = pytest.importorskip("openai_harmony", reason="the Harmony library (test extra) is the oracle")
    for name, conversation in CASES.items():
        assert render_prompt(conversation) == library_ids(oss, conversation), name


def test_documented_prompt_of_a_tool_loop() -> None:
    """The example of docs/format.md in the Harmony library's repository, word for word."""
    weather = Tool("get_weather", "", {"type": "object", "properties": {"location": {"type": "string"}}})
    conversation = Conversation(
        (
            user("What is the weather like in SF?"),
            analysis("Need to use function get_weather."),
            call("get_weather", '{"location":"San Francisco"}'),
            result("get_weather", '{"sunny": true, "temperature": 20}'),
        ),
        tools=(weather,),
        reasoning_effort="high",
        current_date="2025-06-28",
    )
    text = vocabulary().decode(render_prompt(conversation))
    assert text.startswith(
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: high\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.\n"
        "Calls to these tools must go to the commentary channel: 'functions'.<|end|>"
    )
    assert text.endswith(
        "<|start|>user<|message|>What is the weather like in SF?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Need to use function get_weather.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"location":"San Francisco"}<|call|>'
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"
        '{"sunny": true, "temperature": 20}<|end|><|start|>assistant'
    )


# Deviations from the Harmony library, one test each.


def test_call_in_history_has_the_order_in_which_the_model_writes(tokens: Tokens) -> None:
    written = tokens("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>")
    ours = render_message(call("f", "{}"))
    assert ours == tokens("<|start|>assistant") + written
    assert parse(written).messages[0].token_ids == tuple(ours)
    built_in = Message("assistant", "x", "analysis", "python", "code")
    assert render_message(built_in) == tokens(
        "<|start|>assistant<|channel|>analysis to=python code<|message|>x<|call|>"
    )


def test_library_puts_the_recipient_of_an_analysis_call_elsewhere_and_constrains_code() -> None:
    oss = pytest.importorskip("openai_harmony", reason="the Harmony library (test extra) is the oracle")
    built_in = Message("assistant", "x", "analysis", "python", "code")
    theirs = vocabulary().decode(library_ids(oss, Conversation((built_in,)), own_order=True))
    assert "<|start|>assistant to=python<|channel|>analysis <|constrain|>code<|message|>x<|call|>" in theirs


def test_tool_result_has_the_order_of_the_format_document(tokens: Tokens) -> None:
    ours = render_message(result("f", "x"))
    assert ours == tokens("<|start|>functions.f to=assistant<|channel|>commentary<|message|>x<|end|>")
    oss = pytest.importorskip("openai_harmony", reason="the Harmony library (test extra) is the oracle")
    theirs = vocabulary().decode(library_ids(oss, Conversation((result("f", "x"),)), own_order=True))
    assert "<|start|>functions.f<|channel|>commentary to=assistant<|message|>x<|end|>" in theirs


def test_message_to_all_is_no_call(tokens: Tokens) -> None:
    message = Message("assistant", "hi", "final", "all")
    assert render_message(message) == tokens("<|start|>assistant<|channel|>final<|message|>hi<|end|>")
    oss = pytest.importorskip("openai_harmony", reason="the Harmony library (test extra) is the oracle")
    assert "hi<|call|>" in vocabulary().decode(library_ids(oss, Conversation((message,)), own_order=True))


def test_reasoning_before_the_last_final_is_dropped_and_after_it_kept() -> None:
    history = [user("1"), analysis("R1"), final("F1"), user("2"), analysis("R2"), final("F2"), user("3")]
    text = prompt(*history)
    assert "R1" not in text
    assert "R2" not in text
    text = prompt(*history, analysis("R3"), call("f", "{}"), result("f", "x"), analysis("R4"))
    assert "R1" not in text
    assert "R2" not in text
    assert text.index("R3") < text.index("to=functions.f") < text.index("R4")
    text = prompt(
        user("1"), analysis("R1"), call("f", "{}"), result("f", "x"), analysis("R2"), final("F1"), user("2")
    )
    assert "R1" not in text
    assert "R2" not in text
    assert "to=functions.f" in text


def test_library_keeps_reasoning_between_finals_and_we_do_not() -> None:
    oss = pytest.importorskip("openai_harmony", reason="the Harmony library (test extra) is the oracle")
    history = (user("1"), analysis("R1"), final("F1"), user("2"), analysis("R2"), final("F2"), user("3"))
    assert "R2" in vocabulary().decode(library_ids(oss, Conversation(history)))
    assert "R2" not in prompt(*history)


def test_final_in_history_ends_in_end_and_in_a_target_in_return() -> None:
    conversation = Conversation(
        (user("1"), analysis("R1"), final("F1"), user("2"), analysis("R2"), final("F2"))
    )
    history = render_prompt(conversation)
    assert RETURN not in history
    target = render_training(conversation)
    assert target.count(RETURN) == 1
    assert target[-1] == RETURN
    text = vocabulary().decode(target)
    assert "R1" not in text
    assert "R2" in text
    assert render_training(Conversation((user("1"), call("f", "{}"))))[-1] == CALL


def test_nothing_is_escaped_a_second_time() -> None:
    text = 'line1\nsays "x" é'
    assert f"<|message|>{text}<|end|>" in prompt(result("f", text))
    assert f"<|message|>{text}<|call|>" in prompt(call("f", text))


def test_tool_with_empty_parameters_takes_no_argument() -> None:
    assert "type f = () => any;" in developer_text(Conversation(tools=(Tool("f", "", {}),)))


# What holds whatever the library does.


def test_constrain_is_one_special_token_behind_a_blank(tokens: Tokens) -> None:
    ids = render_message(call("f", "{}"))
    assert ids.count(CONSTRAIN) == 1
    place = ids.index(CONSTRAIN)
    assert vocabulary().decode(ids[place - 1 : place + 2]) == " <|constrain|>json"
    assert CONSTRAIN not in render_message(Message("user", CONSTRAINED_JSON))


def test_text_never_becomes_a_special_token() -> None:
    schema = {"type": "object", "properties": {EVIL: {"enum": [EVIL], "description": EVIL, "default": EVIL}}}
    plain = "plain"
    schemas = (schema, {"type": "object", "properties": {plain: {"enum": [plain], "description": plain}}})
    counts = []
    for text, parameters in zip((EVIL, plain), schemas, strict=True):
        conversation = Conversation(
            (
                user(text),
                preamble(text),
                call(text, text),
                result(text, text),
                analysis(text),
                Message("user", text, name=text),
            ),
            instructions=text,
            tools=(Tool(text, text, parameters),),
            builtin_tools=(ToolNamespace(text, text, (Tool(text, text),)),),
            model_identity=text,
            knowledge_cutoff=text,
            current_date=text,
            response_format=ResponseFormat(text, {"const": text}, text),
        )
        ids = render_prompt(conversation)
        counts.append([token_id for token_id in ids if token_id >= NUM_TEXT_TOKENS])
        assert vocabulary().decode(ids).count(text) >= 15
    assert counts[0] == counts[1]


def test_special_text_in_a_message_round_trips() -> None:
    ids = render_message(user(EVIL))
    assert all(token_id < NUM_TEXT_TOKENS for token_id in ids[3:-1])
    assert vocabulary().decode(ids[3:-1]) == EVIL


def test_commentary_line_stands_only_with_functions() -> None:
    line = "Calls to these tools must go to the commentary channel: 'functions'."
    assert line in system_text(Conversation(tools=(Tool("f"),)))
    assert line not in system_text(Conversation(builtin_tools=(BROWSER, PYTHON)))
    assert line not in system_text(Conversation(instructions="x"))


def test_long_instructions_arrive_whole() -> None:
    text = "Réponds toujours en français. " + "Never mind the details. " * 300
    assert f"<|start|>developer<|message|># Instructions\n\n{text}<|end|>" in vocabulary().decode(
        render_prompt(Conversation((user("hi"),), instructions=text))
    )


@pytest.mark.parametrize("instructions", [None, ""])
def test_no_empty_developer_message(instructions: str | None) -> None:
    text = vocabulary().decode(render_prompt(Conversation((user("hi"),), instructions=instructions)))
    assert "developer" not in text


def test_response_format_ends_the_developer_message() -> None:
    form = ResponseFormat("shopping list", {"type": "object", "title": "é"}, "What to\nbuy.")
    text = developer_text(Conversation(instructions="Shop.", tools=(Tool("f"),), response_format=form))
    assert text.startswith("# Instructions\n\nShop.\n\n# Tools\n\n## functions")
    assert text.endswith(
        '\n\n# Response Formats\n\n## shopping list\n\n// What to\n// buy.\n{"type":"object","title":"é"}'
    )


def test_raw_tokens_are_rendered_as_they_are() -> None:
    raw = (200_006, 1, 2, 3, 200_007)
    assert render_messages([Message("assistant", "other", "final", token_ids=raw)]) == list(raw)
    with pytest.raises(HarmonyError, match="201088"):
        render_message(Message("assistant", "x", token_ids=(201_088,)))


def test_call_ends_in_call_and_everything_else_in_end() -> None:
    assert render_message(call("f", ""))[-1] == CALL
    for message in (
        user("x"),
        final("x"),
        preamble("x"),
        result("f", "x"),
        Message("assistant", "x", "final", "all"),
    ):
        assert render_message(message)[-1] == END


@pytest.mark.parametrize("value", ["none", "HIGH", "", None, 3, ["low"]])
def test_effort_that_is_none_is_refused_by_name(value: object) -> None:
    with pytest.raises(HarmonyError, match=r"reasoning effort is .*; expected one of low, medium, high"):
        reasoning_effort(value)
    with pytest.raises(HarmonyError, match="reasoning effort"):
        Conversation(reasoning_effort=value)  # type: ignore[arg-type]


def test_nonsense_is_refused_by_name() -> None:
    with pytest.raises(HarmonyError, match="role is 'function'"):
        Message("function", "x")  # type: ignore[arg-type]
    with pytest.raises(HarmonyError, match="tool's message has no name"):
        Message("tool", "x")
    with pytest.raises(HarmonyError, match=r"tools\[1\] is named 'f', as tools\[0\] is"):
        Conversation(tools=(Tool("f"), Tool("f")))
    with pytest.raises(HarmonyError, match=r"tools\[0\] has no name"):
        Conversation(tools=(Tool(""),))
    with pytest.raises(HarmonyError, match="'container'; expected one of browser, python"):
        builtin_tool("container")
    assert [builtin_tool(name) for name in BUILTIN_TOOLS] == [BROWSER, PYTHON]
