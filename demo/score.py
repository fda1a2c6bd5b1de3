"""Figures of docs/demo.md: `python -m demo.score [MODEL]`: held-out items, greedy, without the grammar."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harmonium import LLM, SamplingParams
from harmonium.chat_events import ChatResult
from harmonium.demo import demo_checkpoint_path
from harmonium.demo_items import DemoItem, demo_items, is_right
from harmonium.harmony.messages import REASONING_EFFORTS

AT_ONCE = 16
MAX_TOKENS = 400


@dataclass(frozen=True)
class Graded:
    item: DemoItem
    effort: str
    result: ChatResult
    right: bool


def grade(llm: LLM, items: Sequence[DemoItem], effort: str | None, date: str | None) -> list[Graded]:
    """Every item at this effort, None: at its own."""

    def ask(item: DemoItem) -> Graded:
        chosen = effort or item.effort
        result = llm.chat(
            item.messages,
            tools=item.tools,
            response_format=item.response_format,
            reasoning_effort=chosen,
            current_date=date,
            grammar=False,
            sampling=SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
        )
        calls = [(call.name, call.arguments) for call in result.tool_calls]
        return Graded(item, chosen, result, is_right(item, result.content, calls))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, items))


def table(graded: Sequence[Graded]) -> str:
    """Accuracy by skill, and by effort with the mean length of the reasoning in tokens."""
    lines = []
    by_skill: dict[tuple[str, str], list[Graded]] = defaultdict(list)
    for each in graded:
        by_skill[each.item.skill, each.effort].append(each)
        by_skill[each.item.skill, "all"].append(each)
    for (skill, effort), group in sorted(by_skill.items()):
        right = sum(each.right for each in group)
        length = sum(each.result.usage.reasoning_tokens for each in group) / len(group)
        share = right / len(group)
        lines.append(f"{skill:13} {effort:7} {right:4} of {len(group):4} {share:7.1%} {length:6.1f} tokens")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--effort", choices=(*REASONING_EFFORTS, "each", "own"), default="own")
    parser.add_argument("--every", type=int, default=1, help="take one item in so many")
    parser.add_argument("--skill", help="only the items of this skill")
    parser.add_argument("--date", default="2026-11-25")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--wrong", type=int, default=0, help="show so many wrong answers of each skill")
    arguments = parser.parse_args()
    items = [item for item in demo_items() if arguments.skill in (None, item.skill)][:: arguments.every]
    efforts: list[str | None] = {"each": list(REASONING_EFFORTS), "own": [None]}.get(
        arguments.effort, [arguments.effort]
    )
    path = arguments.model or demo_checkpoint_path()
    with LLM(path, weights=arguments.weights, threads=arguments.threads, context_length=2048) as llm:
        graded = [each for effort in efforts for each in grade(llm, items, effort, arguments.date)]
    _show_wrong(graded, arguments.wrong)
    print(table(graded))


def _show_wrong(graded: Sequence[Graded], limit: int) -> None:
    shown: dict[str, int] = defaultdict(int)
    for each in graded:
        if each.right or shown[each.item.skill] >= limit:
            continue
        shown[each.item.skill] += 1
        calls = [(call.name, call.arguments) for call in each.result.tool_calls]
        print(
            f"--- {each.item.id} {each.effort}: {json.dumps(list(each.item.messages))[:400]}", file=sys.stderr
        )
        print(f"    reasoning {each.result.reasoning!r}", file=sys.stderr)
        print(f"    wrote {each.result.content!r} {calls}; expected {each.item.expected!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
