"""The tasks by name."""

from __future__ import annotations

import difflib

from harmonium.errors import ConfigError
from harmonium.evals.demo import Demo
from harmonium.evals.humaneval import HumanEval
from harmonium.evals.ifeval import IfEval
from harmonium.evals.math_answer import AIME24, AIME25, Gsm8k
from harmonium.evals.multiple_choice import Gpqa, Mmlu
from harmonium.evals.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (Demo(), Mmlu(), Gpqa(), AIME24, AIME25, Gsm8k(), HumanEval(), IfEval())
}


def find_task(name: str) -> Task:
    """Raises ConfigError for a name that there is not."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no task {name!r}{hint} (there are {', '.join(TASKS)})")
    return TASKS[name]
