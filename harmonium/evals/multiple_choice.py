"""MMLU and GPQA: a question, options under letters, one of them right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

from harmonium.errors import ConfigError
from harmonium.evals.answers import choice_letter
from harmonium.evals.data import DataSet, HubFile, load_data, mmlu_csv_rows
from harmonium.evals.item import Item, Reply, Verdict
from harmonium.evals.task import SHORT_ANSWERS, LoadedTask, Task, user

LETTERS = "ABCD"
_ASK = 'The last line of your answer must be "Answer: X", where X is the letter of the right option.'


def question_text(question: str, options: Sequence[str]) -> str:
    """The question as the model reads it."""
    listed = "\n".join(f"{letter}) {option.strip()}" for letter, option in zip(LETTERS, options, strict=True))
    return f"{question.strip()}\n\n{listed}\n\n{_ASK}"


class _MultipleChoice(Task):
    max_tokens = SHORT_ANSWERS

    def judge(self, item: Item, reply: Reply) -> Verdict:
        letter = choice_letter(reply.content, LETTERS)
        return Verdict(letter == item.expected, letter, "" if letter else "no option is named")


class Mmlu(_MultipleChoice):
    """57 subjects, 14,042 questions."""

    name = "mmlu"
    title = "MMLU"
    about = "multiple choice in 57 subjects (14,042 questions)"
    files = "the authors' SUBJECT_test.csv files; or test-*.parquet of cais/mmlu; or mmlu*.jsonl/csv"
    group_name = "subject"
    data = DataSet(
        ("test-*.parquet", "mmlu*.jsonl*", "mmlu*.csv"),
        (HubFile("cais/mmlu", "all/test-00000-of-00001.parquet"),),
        ("question", "choices", "answer"),
    )

    def load(self, folder: Path | None, seed: int) -> LoadedTask:
        authors = sorted(folder.rglob("*_test.csv")) if folder is not None and folder.is_dir() else []
        if authors:
            return _from_authors(authors)
        loaded = load_data(self.data, folder)
        items = []
        for number, (name, row) in enumerate(loaded.rows):
            choices, answer = row["choices"], row["answer"]
            if isinstance(answer, str) and answer in LETTERS and answer:
                answer = LETTERS.index(answer)
            if not isinstance(choices, list) or len(choices) != 4 or answer not in range(4):
                raise ConfigError(
                    f"{name}, row {number + 1}: expected four choices and an answer from 0 to 3"
                )
            items.append(
                _mmlu_item(str(row.get("subject") or name), number, row["question"], choices, answer)
            )
        return LoadedTask(tuple(items), loaded.digest)


def _from_authors(paths: Sequence[Path]) -> LoadedTask:
    items, digest = [], hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
        subject = path.name.removesuffix("_test.csv")
        for number, row in enumerate(mmlu_csv_rows(path)):
            items.append(_mmlu_item(subject, number, row["question"], row["choices"], row["answer"]))
    return LoadedTask(tuple(items), digest.hexdigest())


def _mmlu_item(subject: str, number: int, question: str, choices: Sequence[str], answer: int) -> Item:
    text = question_text(question, choices)
    return Item(f"{subject}-{number:05d}", subject.replace("_", " "), user(text), LETTERS[answer])


class Gpqa(_MultipleChoice):
    """The diamond subset, 198 questions. Its authors ask that it is not put online as text."""

    name = "gpqa"
    title = "GPQA Diamond"
    about = "multiple choice by domain experts (198 questions, the diamond subset)"
    files = "gpqa_diamond.csv, with the columns Question, Correct Answer, Incorrect Answer 1 to 3"
    group_name = "domain"
    data = DataSet(
        ("gpqa_diamond.csv",),
        (HubFile("Idavidrein/gpqa", "gpqa_diamond.csv"),),
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    )

    def load(self, folder: Path | None, seed: int) -> LoadedTask:
        loaded = load_data(self.data, folder)
        items = []
        for number, (_, row) in enumerate(loaded.rows):
            right, *wrong = (row[column] for column in self.data.columns[1:])
            name = str(row.get("Record ID") or f"gpqa-{number:03d}")
            # The right option comes first in the file: it gets a place of its own, the same in every run.
            options = [right, *wrong]
            order = Random(f"{seed} {name}").sample(range(4), 4)
            text = question_text(row["Question"], [options[place] for place in order])
            group = str(row.get("High-level domain") or "")
            items.append(Item(name, group, user(text), LETTERS[order.index(0)]))
        return LoadedTask(tuple(items), loaded.digest)
