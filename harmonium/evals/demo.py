"""The demo model's held-out questions, which come with the package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from harmonium import demo_items
from harmonium.errors import ConfigError
from harmonium.evals.item import EFFORTS, Item, Reply, Verdict
from harmonium.evals.task import LoadedTask, Task


class Demo(Task):
    """750 questions in six skills, greedy. Each is asked at the effort that stands with it."""

    name = "demo"
    title = "Held-out questions of the demo model"
    about = "what the demo model was trained for, on questions that it never saw (in the package)"
    files = "none: the questions are in the package"
    group_name = "skill"
    temperature = 0.0
    max_tokens = dict.fromkeys(EFFORTS, 1_024)

    def load(self, folder: Path | None, seed: int) -> LoadedTask:
        if folder is not None:
            raise ConfigError("--data has no use here: the demo model's questions are in the package")
        items = tuple(
            Item(
                item.id,
                item.skill,
                item.messages,
                item.expected,
                tools=item.tools,
                response_format=item.response_format,
                effort=next(effort for effort in EFFORTS if effort == item.effort),
                details={"item": item},
            )
            for item in demo_items.demo_items()
        )
        return LoadedTask(items, hashlib.sha256(demo_items.ITEMS_FILE.read_bytes()).hexdigest())

    def judge(self, item: Item, reply: Reply) -> Verdict:
        is_right = demo_items.is_right(item.details["item"], reply.content, reply.tool_calls)
        shown: Any = reply.content or " ".join(f"{name}({arguments})" for name, arguments in reply.tool_calls)
        return Verdict(is_right, str(shown))
