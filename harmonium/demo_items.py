"""The held-out questions of the demo model, and what counts as a right answer.

    for item in demo_items():
        ...ask a server or an LLM: item.messages, item.tools, item.response_format, item.effort...
        right = is_right(item, content, [(call.name, call.arguments) for call in tool_calls])

`demo_items.jsonl` is written by `python -m demo.held_out`. Nothing of an item was trained on: its operands or
values, its wording, its set of tools, its schema, its instruction with its question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Judge = Literal["text", "json", "call"]
ITEMS_FILE = Path(__file__).with_name("demo_items.jsonl")


@dataclass(frozen=True, slots=True)
class DemoItem:
    """One question.

    id: unique, such as "arithmetic-017". skill: arithmetic, text, tools, extraction, instructions or small
    talk. messages, tools, response_format: as the Chat Completions API takes them ([] and None where there is
    none). effort: low, medium or high; the right answer is the same at every effort. judge: how `expected` is
    compared: "text": the answer's text, blanks around it aside; "json": the answer's value; "call": one call,
    {"name": ..., "arguments": {...}}, and no text for the user.
    """

    id: str
    skill: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    response_format: Mapping[str, Any] | None
    effort: str
    judge: Judge
    expected: Any


def demo_items() -> tuple[DemoItem, ...]:
    """All items, in the order of the file: skill by skill."""
    lines = ITEMS_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(_item(json.loads(line)) for line in lines)


def _item(table: Mapping[str, Any]) -> DemoItem:
    lists = {"messages": tuple(table["messages"]), "tools": tuple(table["tools"])}
    return DemoItem(**{**table, **lists})


def is_right(item: DemoItem, content: str, calls: Sequence[tuple[str, str]]) -> bool:
    """Whether the model's turn answers the item. content: the text for the user, "" for none. calls: name and
    arguments (JSON as text) of each tool call.
    """
    if item.judge == "call":
        if len(calls) != 1 or content.strip():
            return False
        name, arguments = calls[0]
        return name == item.expected["name"] and _same_json(arguments, item.expected["arguments"])
    if calls:
        return False
    if item.judge == "json":
        return _same_json(content, item.expected)
    return bool(content.strip() == item.expected)


def _same_json(text: str, expected: object) -> bool:
    """Equal values, numbers and texts told apart; the order of keys is free."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return json.dumps(value, sort_keys=True) == json.dumps(expected, sort_keys=True)
