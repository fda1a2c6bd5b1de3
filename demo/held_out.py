"""Writes harmonium/demo_items.jsonl: `python -m demo.held_out`. Questions of which nothing was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from demo.mixture import Shares, draw_opening, is_on_side
from demo.sample import UNKNOWN, Opening, Sample, compact_json, plain
from harmonium.demo_items import ITEMS_FILE
from harmonium.harmony.messages import REASONING_EFFORTS

SEED = 20251125
COUNTS = {
    "arithmetic": ("plain", 150),
    "text": ("plain", 150),
    "tools": ("tools", 150),
    "extraction": ("schema", 120),
    "instructions": ("form", 120),
    "small talk": ("plain", 60),
}
SHARES = Shares(
    {"plain": 0.40, "tools": 0.27, "schema": 0.20, "form": 0.13},
    {"arithmetic": 0.42, "text": 0.43, "small talk": 0.15},
    is_wide=False,
    without_tool=0.08,
)
"""Fixed: the questions stay the same when the training's shares change."""
_STRANGE = (
    " quantum",
    " democracy",
    " volcano",
    " Shakespeare",
    " bicycle",
    " gravity",
    " insurance",
    " dinosaurs",
    " jazz",
    " penguins",
    " cryptography",
    " tomorrow",
    " philosophy",
    " hurricane",
    " algorithm",
    " marriage",
    " Napoleon",
    " yoga",
    " mortgage",
    " chemistry",
    " database",
    " holidays",
    " football",
    " inflation",
    " elephants",
    " Buddhism",
)


def items() -> Iterator[dict[str, Any]]:
    random = Random(SEED)
    for skill, (kind, count) in COUNTS.items():
        asked: set[str] = set()
        for number in range(count):
            effort = REASONING_EFFORTS[number % 3]
            while True:
                opening, draw = draw_opening(random, kind, True, effort, SHARES)
                sample = _draw_skill(draw, skill)
                if sample is not None and sample.question not in asked:
                    break
            asked.add(sample.question)
            yield _item(f"{skill.replace(' ', '-')}-{number:03d}", random, opening, sample)


def _draw_skill(draw: Any, skill: str) -> Sample | None:
    """A held-out sample of the skill, None where this opening has none soon."""
    for _ in range(2000):
        sample: Sample = draw()
        if sample.skill == skill and is_on_side(sample, True):
            return sample
    return None


def _item(name: str, random: Random, opening: Opening, sample: Sample) -> dict[str, Any]:
    question = sample.question
    while UNKNOWN in question:
        question = question.replace(UNKNOWN, random.choice(_STRANGE), 1)
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.strip()}]
    if opening.instructions:
        messages.insert(0, {"role": "developer", "content": opening.instructions})
    judge, expected = "text", plain(sample.final)
    answered = sample.call is not None and random.random() < 1 / 3
    if sample.call is not None and not answered:
        judge, expected = "call", {"name": sample.call[0], "arguments": sample.call[1]}  # type: ignore[assignment]
    elif answered:
        messages += _answered(sample)
    elif sample.skill == "extraction":
        judge, expected = "json", json.loads(expected)
    return {
        "id": name,
        "skill": sample.skill,
        "messages": messages,
        "tools": [_tool(tool) for tool in opening.tools],
        "response_format": _response_format(opening),
        "effort": opening.effort,
        "judge": judge,
        "expected": expected,
    }


def _answered(sample: Sample) -> list[dict[str, Any]]:
    assert sample.call is not None
    name, arguments = sample.call
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": name, "arguments": compact_json(arguments)},
    }
    return [
        {"role": "assistant", "reasoning": sample.analysis, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": sample.result},
    ]


def _tool(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _response_format(opening: Opening) -> dict[str, Any] | None:
    form = opening.response_format
    if form is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema, "strict": True}}


def main() -> None:
    lines = [json.dumps(item, ensure_ascii=False) for item in items()]
    ITEMS_FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} items, {ITEMS_FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
