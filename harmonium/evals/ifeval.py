"""IFEval: instructions whose obedience a program can check, checked by lm-eval's port of the authors' code.

The 25 kinds of checks are lm-eval's (extra [ifeval]) and run here on our answers; only asking, counting and
reporting are ours. The score of an item is prompt-level strict: all its instructions are followed as written.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import threading
from pathlib import Path
from types import ModuleType

from harmonium.errors import ConfigError
from harmonium.evals.data import DataSet, HubFile, load_data
from harmonium.evals.item import Item, Reply, Verdict
from harmonium.evals.task import SHORT_ANSWERS, LoadedTask, Task, user

_CHECKS = "lm_eval.tasks.ifeval.utils"


class IfEval(Task):
    """541 prompts with one to three instructions each."""

    name = "ifeval"
    title = "IFEval"
    about = (
        "instructions that a program can check (541 prompts, prompt-level strict); needs the extra [ifeval]"
    )
    files = "input_data.jsonl or ifeval_input_data.jsonl, as published"
    max_tokens = SHORT_ANSWERS
    data = DataSet(
        ("*input_data.jsonl", "ifeval*.jsonl"),
        (HubFile("google/IFEval", "ifeval_input_data.jsonl"),),
        ("key", "prompt", "instruction_id_list", "kwargs"),
    )

    def __init__(self) -> None:
        self._checks: ModuleType | None = None
        # Language detection and the checks' random choices keep state of their own.
        self._lock = threading.Lock()

    def prepare(self) -> None:
        try:
            # Its first import fetches a tokenizer of sentences and talks about it.
            with contextlib.redirect_stdout(io.StringIO()):
                self._checks = importlib.import_module(_CHECKS)
                nltk = importlib.import_module("nltk")
        except ImportError as error:
            raise ConfigError(
                f"ifeval needs lm-eval's checks: pip install 'harmonium[ifeval]' ({error})"
            ) from None
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            raise ConfigError(
                "ifeval counts sentences with NLTK's punkt_tab, which is not here and could not be fetched: "
                "python -m nltk.downloader punkt_tab"
            ) from None

    def load(self, folder: Path | None, seed: int) -> LoadedTask:
        loaded = load_data(self.data, folder)
        items = tuple(
            Item(
                f"ifeval-{row['key']}",
                "",
                user(row["prompt"]),
                list(row["instruction_id_list"]),
                details={"key": row["key"], "prompt": row["prompt"], "kwargs": list(row["kwargs"])},
            )
            for _, row in loaded.rows
        )
        return LoadedTask(items, loaded.digest)

    def judge(self, item: Item, reply: Reply) -> Verdict:
        checks = self._checks
        assert checks is not None, "prepare comes first"
        details = item.details
        example = checks.InputExample(details["key"], item.expected, details["prompt"], details["kwargs"])
        with self._lock:
            followed = checks.test_instruction_following_strict(
                example, reply.content
            ).follow_instruction_list
        missed = [name for name, is_followed in zip(item.expected, followed, strict=True) if not is_followed]
        return Verdict(not missed, reply.content, f"not followed: {', '.join(missed)}" if missed else "")
