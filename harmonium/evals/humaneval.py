"""HumanEval: the model completes a Python function, its tests run in the sandbox."""

from __future__ import annotations

import re
from pathlib import Path

from harmonium.evals.data import DataSet, HubFile, load_data
from harmonium.evals.item import Item, Reply, Verdict
from harmonium.evals.sandbox import check_sandbox, run_confined
from harmonium.evals.task import SHORT_ANSWERS, LoadedTask, Task, user

SECONDS = 10.0
"""For one program. The slowest reference solution needs about a second on a slow core."""

_ASK = (
    "Complete this Python function. Answer with the whole function, with its imports, in one block of code."
)
_BLOCK = re.compile(
    r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:\r?\n[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE
)


class HumanEval(Task):
    """164 problems. The score is pass@1; K samples make its mean more certain."""

    name = "humaneval"
    title = "HumanEval"
    about = "Python functions, judged by their tests in a sandbox (164 problems)"
    files = "HumanEval.jsonl or HumanEval.jsonl.gz, as published"
    max_tokens = SHORT_ANSWERS
    data = DataSet(
        ("HumanEval*.jsonl", "HumanEval*.jsonl.gz", "humaneval*.jsonl*", "test-*.parquet"),
        (HubFile("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet"),),
        ("task_id", "prompt", "test", "entry_point"),
    )

    def prepare(self) -> None:
        check_sandbox()

    def load(self, folder: Path | None, seed: int) -> LoadedTask:
        loaded = load_data(self.data, folder)
        items = tuple(
            Item(
                str(row["task_id"]),
                "",
                user(f"{_ASK}\n\n```python\n{row['prompt'].strip()}\n```"),
                row["entry_point"],
                details={"prompt": row["prompt"], "test": row["test"]},
            )
            for _, row in loaded.rows
        )
        return LoadedTask(items, loaded.digest)

    def judge(self, item: Item, reply: Reply) -> Verdict:
        code = program(reply.content, item.details["prompt"], item.expected)
        if code is None:
            return Verdict(False, None, f"no code that defines {item.expected}")
        test = f"{code}\n\n{item.details['test']}\n\ncheck({item.expected})\n"
        outcome = run_confined(test, SECONDS)
        return Verdict(outcome.passed, code, outcome.reason)


def program(answer: str, prompt: str, entry_point: str) -> str | None:
    """The code to test: the answer's last block that defines the function, behind the prompt's imports.

    A block with the function's body alone goes behind the prompt, as the data set was made for. An answer
    without a block is taken as code itself when it defines the function. None: there is none of these.
    """
    blocks = [match[1] for match in _BLOCK.finditer(answer)]
    defines = re.compile(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    whole = next((block for block in reversed(blocks) if defines.search(block)), None)
    if whole is None and not blocks and defines.search(answer):
        whole = answer
    if whole is not None:
        # Helpers that the prompt defines before the function are there even if the answer leaves them out.
        return f"{prompt}\n    pass\n\n{whole}"
    body = next((block for block in reversed(blocks) if re.match(r"^(?:[ \t]+\S|\s*$)", block)), None)
    return f"{prompt}{body}" if body is not None else None
