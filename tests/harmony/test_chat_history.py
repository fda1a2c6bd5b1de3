"""Messages of a chat API become Harmony's, or a refusal that says where and why."""

from __future__ import annotations

from typing import Any

import pytest

from harmonium.errors import HarmonyError
from harmonium.harmony import (
    CONSTRAINED_JSON,
    Conversation,
    Message,
    Tool,
    messages_from_chat,
    render_prompt,
    tools_from_chat,
    vocabulary,
)

Chat = list[dict[str, Any]]


def tool_call(name: str = "f", arguments: object = "{}", call_id: str = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def rendered(messages: Chat) -> str:
    """The prompt behind its system message."""
    history = messages_from_chat(messages)
    ids = render_prompt(Conversation(history.messages, instructions=history.instructions))
    return vocabulary().decode(ids).split("<|end|>", 1)[1]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_preamble_and_call_keep_their_order(field: str) -> None:
    text = rendered(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Let me look.", field: "need f", "tool_calls": [tool_call()]},
            {"role": "tool", "tool_call_id": "c1", "content": "22"},
        ]
    )
    assert text == (
        "<|start|>user<|message|>hi<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>need f<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>22<|end|><|start|>assistant"
    )


@pytest.mark.parametrize("calls", [[], None])
def test_empty_tool_calls_are_no_tool_calls(calls: object) -> None:
    assert messages_from_chat([{"role": "assistant", "content": "hi", "tool_calls": calls}]).messages == (
        Message("assistant", "hi", channel="final"),
    )


def test_reasoning_before_a_final_is_not_in_the_prompt() -> None:
    chat: Chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "reasoning": "SECRET", "content": "A"},
        {"role": "user", "content": "q2"},
    ]
    assert "SECRET" not in rendered(chat)
    assert rendered(chat).endswith(
        "<|start|>assistant<|channel|>final<|message|>A<|end|><|start|>user<|message|>q2<|end|><|start|>assistant"
    )


def test_reasoning_between_the_calls_of_a_turn_stays() -> None:
    chat: Chat = [{"role": "user", "content": "q"}]
    for number in range(3):
        chat.append(
            {"role": "assistant", "reasoning": f"R{number}", "content": None, "tool_calls": [tool_call()]}
        )
        chat.append({"role": "tool", "tool_call_id": "c1", "content": f"T{number}"})
    text = rendered(chat)
    places = [text.index(part) for number in range(3) for part in (f"R{number}", f"T{number}")]
    assert places == sorted(places)


def test_leading_instructions_are_joined_and_later_ones_stay_in_place() -> None:
    history = messages_from_chat(
        [
            {"role": "system", "content": "You are a bot"},
            {"role": "developer", "content": "The user's name is Bo"},
            {"role": "user", "content": "My name?"},
            {"role": "developer", "content": "Answer in French"},
            {"role": "system", "content": ""},
            {"role": "user", "content": "Well?"},
        ]
    )
    assert history.instructions == "You are a bot\n\nThe user's name is Bo"
    assert history.messages == (
        Message("user", "My name?"),
        Message("developer", "# Instructions\n\nAnswer in French"),
        Message("user", "Well?"),
    )
    assert messages_from_chat([{"role": "user", "content": "x"}]).instructions is None
    assert "developer" not in rendered([{"role": "system", "content": ""}, {"role": "user", "content": "x"}])


def test_arguments_and_results_are_not_encoded_again() -> None:
    raw = 'line1\nsays "x" é'
    chat: Chat = [
        {"role": "assistant", "content": None, "tool_calls": [tool_call(arguments=raw)]},
        {"role": "tool", "tool_call_id": "c1", "content": raw},
    ]
    assert rendered(chat).count(f"<|message|>{raw}<|") == 2
    parsed = messages_from_chat([{"role": "assistant", "tool_calls": [tool_call(arguments={"a": "é"})]}])
    assert parsed.messages[0].content == '{"a":"é"}'


def test_content_parts_are_one_text() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c"},
    ]
    assert messages_from_chat([{"role": "user", "content": parts}]).messages[0].content == "abc"
    refusal = [{"type": "refusal", "refusal": "No."}]
    assert messages_from_chat([{"role": "assistant", "content": refusal}]).messages[0].content == "No."
    assert messages_from_chat([{"role": "assistant", "content": None, "refusal": "No."}]).messages == (
        Message("assistant", "No.", channel="final"),
    )


def test_results_follow_in_the_order_of_their_calls() -> None:
    history = messages_from_chat(
        [
            {"role": "assistant", "tool_calls": [tool_call("f", call_id="a"), tool_call("g", call_id="b")]},
            {"role": "tool", "tool_call_id": "b", "content": "of g"},
            {"role": "tool", "tool_call_id": "a", "content": "of f"},
            {"role": "user", "content": "next"},
        ]
    )
    assert [(message.name, message.content) for message in history.messages[2:]] == [
        ("functions.f", "of f"),
        ("functions.g", "of g"),
        (None, "next"),
    ]


def test_id_used_again_means_the_latest_call() -> None:
    history = messages_from_chat(
        [
            {"role": "assistant", "tool_calls": [tool_call("f")]},
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
            {"role": "assistant", "tool_calls": [tool_call("g")]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ]
    )
    assert [message.name for message in history.messages if message.role == "tool"] == [
        "functions.f",
        "functions.g",
    ]


def test_built_in_tool_keeps_its_recipient_where_it_was_offered() -> None:
    chat: Chat = [
        {"role": "assistant", "tool_calls": [tool_call("browser.search", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
    ]
    call, result = messages_from_chat(chat, builtin_tools=["browser"]).messages
    assert (call.recipient, call.channel, call.content_type) == ("browser.search", "analysis", "code")
    assert (result.name, result.channel) == ("browser.search", "analysis")
    call, result = messages_from_chat(chat).messages
    assert (call.recipient, call.channel, call.content_type) == (
        "functions.browser.search",
        "commentary",
        CONSTRAINED_JSON,
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "content": None}, ()),
        ({"role": "assistant", "content": ""}, (Message("assistant", "", channel="final"),)),
        (
            {"role": "assistant", "content": None, "reasoning": "r"},
            (Message("assistant", "r", channel="analysis"),),
        ),
        (
            {"role": "assistant", "content": "", "reasoning": "r"},
            (Message("assistant", "r", channel="analysis"),),
        ),
    ],
)
def test_what_we_may_have_answered_is_taken_back(
    message: dict[str, Any], expected: tuple[Message, ...]
) -> None:
    assert messages_from_chat([message]).messages == expected


DEEP: Any = []
for _ in range(10_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("hi", r"messages\[1\] is 'hi'; expected an object"),
        (None, r"messages\[1\] is missing"),
        ({}, r"messages\[1\].role is missing; expected system"),
        ({"role": "function", "content": "x"}, r"messages\[1\].role is 'function'"),
        ({"role": "user"}, r"messages\[1\].content is missing; expected text"),
        ({"role": "user", "content": 3}, r"messages\[1\].content is 3"),
        ({"role": "user", "content": {"a": 1}}, r"messages\[1\].content is an object"),
        ({"role": "user", "content": DEEP}, r"messages\[1\].content\[0\] is a list"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            r"content\[0\].type is 'image_url'; expected 'text'",
        ),
        ({"role": "user", "content": [{"type": ["text"]}]}, r"content\[0\].type is a list"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"content\[0\].text is missing"),
        ({"role": "system", "content": None}, r"messages\[1\].content is missing"),
        ({"role": "assistant", "content": "x", "function_call": {}}, r"function_call is not supported"),
        ({"role": "assistant", "reasoning": 3}, r"messages\[1\].reasoning is 3"),
        (
            {"role": "assistant", "reasoning": "a", "thinking": "b"},
            r"thinking differs from messages\[1\].reasoning",
        ),
        ({"role": "assistant", "tool_calls": {}}, r"tool_calls is an object; expected a list"),
        ({"role": "assistant", "tool_calls": [None]}, r"tool_calls\[0\] is missing"),
        ({"role": "assistant", "tool_calls": [{"type": "frog"}]}, r"tool_calls\[0\].type is 'frog'"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, r"tool_calls\[0\].custom is missing"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\].function is missing"),
        ({"role": "assistant", "tool_calls": [tool_call("")]}, r"function.name is ''"),
        ({"role": "assistant", "tool_calls": [tool_call("a b")]}, r"function.name is 'a b'"),
        ({"role": "assistant", "tool_calls": [tool_call(arguments=3)]}, r"function.arguments is 3"),
        ({"role": "assistant", "tool_calls": [tool_call() | {"id": 3}]}, r"tool_calls\[0\].id is 3"),
        ({"role": "tool", "content": "x"}, r"messages\[1\].tool_call_id is missing"),
        ({"role": "tool", "content": "x", "tool_call_id": "zz"}, r"tool_call_id is 'zz'; no earlier message"),
        ({"role": "x" * 10_000, "content": "x"}, r"role is 'x{70,80}\.\.\.;"),
    ],
)
def test_nonsense_is_refused_with_place_and_value(message: Any, complaint: str) -> None:
    with pytest.raises(HarmonyError, match=complaint):
        messages_from_chat([{"role": "user", "content": "fine"}, message])


@pytest.mark.parametrize(
    "name",
    ["f", "functions.f", "functions.functions.f", "f<|channel|>commentary", "functions.f<|constrain|>json"],
)
def test_name_that_another_server_soiled_is_replayed_clean(name: str) -> None:
    """The model repeats what it reads: a glued marker in the history would snowball."""
    called = {"role": "assistant", "tool_calls": [tool_call(name)]}
    result = {"role": "tool", "tool_call_id": tool_call(name)["id"], "content": "x"}
    messages = messages_from_chat([called, result]).messages
    assert messages[0].recipient == "functions.f"
    assert messages[1].name == "functions.f"


def test_messages_that_are_no_list_are_refused() -> None:
    with pytest.raises(HarmonyError, match="messages is 'hi'; expected a list"):
        messages_from_chat("hi")  # type: ignore[arg-type]


def test_tools_come_nested_or_flat() -> None:
    schema = {"type": "object", "properties": {}}
    nested = {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": schema, "strict": True},
    }
    assert tools_from_chat([nested]) == (Tool("f", "d", schema),)
    assert tools_from_chat([{"type": "function", **nested["function"]}]) == (Tool("f", "d", schema),)
    assert tools_from_chat([{"type": "function", "function": {"name": "f"}}]) == (Tool("f"),)
    assert tools_from_chat(None) == tools_from_chat([]) == ()


@pytest.mark.parametrize(
    ("tool", "complaint"),
    [
        ("f", r"tools\[0\] is 'f'"),
        ({"type": "custom", "name": "f"}, r"tools\[0\].type is 'custom'; expected 'function'"),
        ({"type": "function", "function": "f"}, r"tools\[0\].function is 'f'"),
        ({"type": "function", "function": {}}, r"tools\[0\].name is missing"),
        ({"type": "function", "function": {"name": "a\nb"}}, r"tools\[0\].name is 'a\\nb'"),
        ({"type": "function", "function": {"name": "functions.f"}}, r"without the namespace"),
        ({"type": "function", "function": {"name": "f", "description": 3}}, r"tools\[0\].description is 3"),
        ({"type": "function", "function": {"name": "f", "parameters": "x"}}, r"tools\[0\].parameters is 'x'"),
    ],
)
def test_tool_that_cannot_be_offered_is_refused(tool: Any, complaint: str) -> None:
    with pytest.raises(HarmonyError, match=complaint):
        tools_from_chat([tool])
