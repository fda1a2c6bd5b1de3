"""Items -> Harmony messages, and prompts from conversations."""

from __future__ import annotations

from typing import Any

import pytest

from harmonium.errors import RequestError
from harmonium.harmony.messages import Message
from harmonium.server.responses_items import Composed, Entry, compose, read_input
from harmonium.server.responses_seal import Seal, SealedReasoning, new_key

SEAL = Seal(new_key())


def _composed(*items: dict[str, Any], instructions: str | None = None) -> Composed:
    return compose(instructions, read_input(items, (), SEAL).entries)


def _shape(*items: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    return [(message.role, message.channel, message.content) for message in _composed(*items).messages]


def _call(call_id: str, name: str = "f", arguments: str = "{}", **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **fields}


def _result(call_id: str, output: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def test_history_with_ids_status_and_empty_fields_is_read() -> None:
    """B34: what clients send on the second turn."""
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}], "id": "m1"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "R"}],
            "encrypted_content": None,
            "status": None,
        },
        _call("c1", id="fc_1", status="completed"),
        {**_result("c1", "22"), "id": "x", "status": "completed"},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "It is 22.", "annotations": [], "logprobs": []}],
        },
        {"role": "user", "content": "Thanks"},
    ]
    assert _shape(*items) == [
        ("user", None, "Hi"),
        ("assistant", "analysis", "R"),
        ("assistant", "commentary", "{}"),
        ("tool", "commentary", "22"),
        ("assistant", "final", "It is 22."),
        ("user", None, "Thanks"),
    ]


def test_text_before_a_call_is_a_preamble_and_other_text_is_final() -> None:
    say = {"role": "assistant", "content": "Let me look."}
    assert _shape(say, _call("c"), _result("c", "1"))[0][1] == "commentary"
    assert _shape(say, {"type": "reasoning", "content": [{"type": "text", "text": "R"}]}, _call("c"))[0][
        1
    ] == ("commentary")
    assert _shape(say, {"role": "user", "content": "x"}, _call("c"))[0][1] == "final"
    assert _shape({**say, "phase": "commentary"}, {"role": "user", "content": "x"})[0][1] == "commentary"
    assert _shape({**say, "phase": "final_answer"}, _call("c"))[0][1] == "final"


def test_results_follow_in_the_order_of_their_calls() -> None:
    shape = _shape(
        _call("a"), _call("b"), _result("b", "B"), _result("a", "A"), {"role": "user", "content": "x"}
    )
    assert [content for role, _, content in shape if role == "tool"] == ["A", "B"]
    in_turn = _shape(_call("a"), _result("a", "A"), _call("b"), _result("b", "B"))
    assert [content for _, _, content in in_turn] == ["{}", "A", "{}", "B"]


def test_leading_developer_messages_are_instructions_and_later_ones_stay() -> None:
    composed = _composed(
        {"role": "system", "content": "You are a bot."},
        {"role": "developer", "content": "The user is Bo."},
        {"role": "user", "content": "Hi"},
        {"role": "developer", "content": "Be brief."},
        {"role": "developer", "content": ""},
        instructions="First.",
    )
    assert composed.instructions == "First.\n\nYou are a bot.\n\nThe user is Bo."
    assert [message.content for message in composed.messages] == ["Hi", "# Instructions\n\nBe brief."]
    assert _composed().instructions is None


def test_arguments_and_results_are_not_escaped_again() -> None:
    text = 'line1\nsays "x" é'
    shape = _shape(_call("c", arguments='{"a": "\\u00e9"}'), _result("c", text))
    assert [content for _, _, content in shape] == ['{"a": "\\u00e9"}', text]


def test_call_of_a_namespace_keeps_its_name_in_the_prompt() -> None:
    (message,) = _composed(_call("c", "read", namespace="files")).messages
    assert message.recipient == "functions.files__read"


def test_custom_call_is_free_text() -> None:
    items = (
        {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** Begin\n"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
    )
    call, result = _composed(*items).messages
    assert (call.recipient, call.content_type, call.content) == ("functions.apply_patch", None, "*** Begin\n")
    assert (result.name, result.content) == ("functions.apply_patch", "done")


def test_sealed_reasoning_gives_the_tokens_of_the_model() -> None:
    sealed = SEAL.close(SealedReasoning("R", (200006, 1, 200007)))
    item = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": sealed}
    (message,) = _composed(item).messages
    assert (message.content, message.token_ids) == ("R", (200006, 1, 200007))


def test_foreign_seal_is_used_for_nothing() -> None:
    foreign = Seal(new_key()).close(SealedReasoning("evil", (200006, 1, 200007)))
    clear = {
        "type": "reasoning",
        "content": [{"type": "reasoning_text", "text": "R"}],
        "encrypted_content": foreign,
    }
    given = read_input([clear], (), SEAL)
    assert given.entries[0].message == Message("assistant", "R", channel="analysis")
    assert "not ours" in given.warnings[0]
    with pytest.raises(RequestError, match=r"input\[0\]\.encrypted_content"):
        read_input([{"type": "reasoning", "summary": [], "encrypted_content": foreign}], (), SEAL)


def test_summary_stands_in_for_reasoning_that_is_not_there() -> None:
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}
    assert _shape(item) == [("assistant", "analysis", "short")]
    assert _shape({"type": "reasoning", "summary": []}) == []


def test_call_of_an_earlier_response_can_be_answered() -> None:
    call = Message("assistant", "{}", channel="commentary", recipient="functions.f")
    given = read_input([_result("c", "1")], [Entry(call, "fc_1", "c")], SEAL)
    assert given.entries[0].message.name == "functions.f"


def test_foreign_tools_items_are_left_out_with_a_warning() -> None:
    given = read_input([{"type": "web_search_call", "id": "ws", "status": "completed"}], (), SEAL)
    assert given.entries == ()
    assert "web_search_call" in given.warnings[0]


def test_every_item_is_listed_with_an_id() -> None:
    given = read_input([{"role": "user", "content": "x"}, _call("c")], (), SEAL)
    assert [item["type"] for item in given.items] == ["message", "function_call"]
    assert all(item["id"] for item in given.items)
    assert given.items[0]["content"] == [{"type": "input_text", "text": "x"}]


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"type": "message", "role": "user"}, "content"),
        ({"type": "message", "role": "user", "content": [{"type": "input_audio"}]}, r"content\[0\]\.type"),
        ({"type": "message", "role": "user", "content": [{"type": "input_text"}]}, r"content\[0\]\.text"),
        ({"type": "message", "role": "user", "content": "x", "id": 5}, "id"),
        ({"type": "message", "role": [], "content": "x"}, "role"),
        (_call("", "f"), "name"),
        (_call("c", "a b"), "name"),
        (_call("c", "f", arguments=5), "arguments"),  # type: ignore[arg-type]
        ({"type": "function_call", "name": "f"}, "call_id"),
        (_result("nobody", "x"), "call_id"),
        ({"type": "reasoning", "content": 5}, "content"),
        ({"type": []}, "type"),
    ],
)
def test_item_that_cannot_be_read_is_named(item: dict[str, Any], place: str) -> None:
    with pytest.raises(RequestError, match=rf"input\[0\]\.{place}"):
        read_input([item], (), SEAL)


def test_long_conversation_is_composed_in_linear_time() -> None:
    items = [{"role": "user" if n % 2 else "assistant", "content": "x"} for n in range(10_000)]
    assert len(_composed(*items).messages) == 10_000


def test_entry_survives_json() -> None:
    message = Message("assistant", "x", channel="analysis", token_ids=(1, 2))
    assert Entry.from_json(Entry(message, "rs_1", None).to_json()) == Entry(message, "rs_1", None)
