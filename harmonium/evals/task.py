"""What a task is, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harmonium.evals.item import EFFORTS, Effort, Item, Reply, Verdict


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """The items in the data set's order. digest: of the files that they came from."""

    items: tuple[Item, ...]
    digest: str


class Task(ABC):
    """A data set with its questions and its judge.

    name: on the command line. title: for people. about: one line. files: what --data must hold, for --list.
    efforts: what is run where nothing is said. max_tokens: longest answer, reasoning included, by effort;
    long enough that a model which reasons for long is not cut off. temperature: what is sent where nothing is
    said (1.0 is what gpt-oss is used with). group_name: of the table by group, "" for none.
    """

    name: str
    title: str
    about: str
    files: str
    efforts: Sequence[Effort] = EFFORTS
    max_tokens: Mapping[Effort, int]
    temperature: float = 1.0
    group_name: str = ""

    def prepare(self) -> None:  # noqa: B027 - most tasks need nothing
        """Find out before the first question what the judge needs. Raises ConfigError when it is missing."""

    @abstractmethod
    def load(self, folder: Path | None, seed: int) -> LoadedTask:
        """The items, from a folder or from the hub.

        seed: for what the task itself shuffles (GPQA's options). Raises ConfigError.
        """

    @abstractmethod
    def judge(self, item: Item, reply: Reply) -> Verdict:
        """Whether this whole, non-empty reply is right. May be called from several threads at once."""


SHORT_ANSWERS: Mapping[Effort, int] = {"low": 8_192, "medium": 16_384, "high": 65_536}
"""For questions that take a page of reasoning; at high effort some take dozens."""


def user(text: str) -> tuple[Mapping[str, str], ...]:
    """The messages of a question that stands alone."""
    return ({"role": "user", "content": text},)
