"""AIME and GSM8K: the answer is a number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import MappingProxyType

from harmonium.errors import ConfigError
from harmonium.evals.answers import number, whole_number
from harmonium.evals.data import DataSet, HubFile, load_data
from harmonium.evals.item import Effort, Item, Reply, Verdict
from harmonium.evals.task import SHORT_ANSWERS, LoadedTask, Task, user

_ASK_BOXED = "Reason step by step and put the final answer in \\boxed{}."


class Aime(Task):
    """One year's two papers: 30 problems, answers from 0 to 999."""

    group_name = "paper"
    # OpenAI's model card (arXiv 2508.10925, 2.6.1): gpt-oss-20b takes over 20,000 tokens a problem on
    # average.
    max_tokens: Mapping[Effort, int] = MappingProxyType({"low": 16_384, "medium": 32_768, "high": 98_304})

    def __init__(self, year: int, hub: tuple[HubFile, ...]) -> None:
        short = f"aime{year % 100}"
        self.name, self.title = short, f"AIME {year}"
        self.about = f"the {year} competition's 30 problems, answers from 0 to 999"
        self.files = f"{short}*.jsonl or aime{year}*.jsonl, with question (or problem) and answer"
        stems = (short, f"aime{year}", f"aime_{year}")
        patterns = tuple(f"{stem}*.{ending}" for stem in stems for ending in ("jsonl", "jsonl.gz", "parquet"))
        self._data = DataSet(patterns, hub, ())

    def load(self, folder: Path | None, seed: int) -> LoadedTask:
        loaded = load_data(self._data, folder)
        items = []
        for place, (name, row) in enumerate(loaded.rows, start=1):
            cells = {column.lower(): value for column, value in row.items()}
            question = cells.get("question") or cells.get("problem")
            # A file of 2025 marks one answer with a degree sign.
            digits = re.match(r"\d+", str(cells.get("answer")))
            if not isinstance(question, str) or digits is None:
                raise ConfigError(f"{name}, row {place}: expected question (or problem) and a whole answer")
            text = f"{question.strip()}\n\n{_ASK_BOXED}"
            items.append(Item(f"{self.name}-{place:02d}", name, user(text), int(digits[0])))
        return LoadedTask(tuple(items), loaded.digest)

    def judge(self, item: Item, reply: Reply) -> Verdict:
        value = whole_number(reply.content)
        return Verdict(value == item.expected, _shown(value), "" if value is not None else "no whole number")


AIME24 = Aime(2024, (HubFile("Maxwell-Jia/AIME_2024", "aime_2024_problems.parquet"),))
AIME25 = Aime(
    2025,
    (
        HubFile("opencompass/AIME2025", "aime2025-I.jsonl"),
        HubFile("opencompass/AIME2025", "aime2025-II.jsonl"),
    ),
)


class Gsm8k(Task):
    """1,319 word problems of school; the answer stands after "####"."""

    name = "gsm8k"
    title = "GSM8K"
    about = "word problems of grade school (1,319 questions)"
    files = "test.jsonl or gsm8k*.jsonl, with question and answer, as published"
    max_tokens = SHORT_ANSWERS
    data = DataSet(
        ("gsm8k*.jsonl*", "test.jsonl*", "test-*.parquet"),
        (HubFile("openai/gsm8k", "main/test-00000-of-00001.parquet"),),
        ("question", "answer"),
    )

    def load(self, folder: Path | None, seed: int) -> LoadedTask:
        loaded = load_data(self.data, folder)
        items = []
        for place, (name, row) in enumerate(loaded.rows, start=1):
            _, mark, answer = str(row["answer"]).rpartition("####")
            try:
                expected = Decimal(answer.strip().replace(",", ""))
            except InvalidOperation:
                mark = ""
            if not mark:
                raise ConfigError(f"{name}, row {place}: the answer does not end with #### and a number")
            text = f"{row['question'].strip()}\n\n{_ASK_BOXED}"
            items.append(Item(f"gsm8k-{place:04d}", "", user(text), str(expected)))
        return LoadedTask(tuple(items), loaded.digest)

    def judge(self, item: Item, reply: Reply) -> Verdict:
        value = number(reply.content)
        return Verdict(
            value == Decimal(item.expected), _shown(value), "" if value is not None else "no number"
        )


def _shown(value: object) -> str | None:
    return None if value is None else str(value)
