"""The held-out items of the demo model are whole, and judged by what they ask for."""

from __future__ import annotations

import json

from harmonium.demo_items import DemoItem, demo_items, is_right
from harmonium.harmony.messages import REASONING_EFFORTS


def _right_answer(item: DemoItem) -> tuple[str, list[tuple[str, str]]]:
    if item.judge == "call":
        return "", [(item.expected["name"], json.dumps(item.expected["arguments"]))]
    return (json.dumps(item.expected) if item.judge == "json" else f"{item.expected}\n"), []


def test_every_item_is_unique_and_complete() -> None:
    items = demo_items()
    assert len({item.id for item in items}) == len(items) >= 700
    assert {item.skill for item in items} == {
        "arithmetic",
        "text",
        "tools",
        "extraction",
        "instructions",
        "small talk",
    }
    assert all(item.effort in REASONING_EFFORTS and item.messages for item in items)
    assert all(item.tools for item in items if item.skill == "tools")
    assert all(item.response_format for item in items if item.skill == "extraction")


def test_the_expected_answer_is_right_and_nothing_else_is() -> None:
    for item in demo_items():
        content, calls = _right_answer(item)
        assert is_right(item, content, calls), item.id
        assert not is_right(item, "", []), item.id
        assert not is_right(item, content + "x", calls), item.id
        assert not is_right(item, content, [*calls, ("f", "{}")]), item.id


def test_a_number_that_is_asked_for_is_no_text() -> None:
    item = next(item for item in demo_items() if "guests" in str(item.expected))
    wrong = {name: str(value) for name, value in item.expected.items()}
    assert not is_right(item, json.dumps(wrong), [])
