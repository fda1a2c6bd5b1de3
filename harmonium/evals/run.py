"""Asking: several questions at once, each answer judged and written down as it comes."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from harmonium.errors import EngineError
from harmonium.evals.client import AskFailed, ChatClient, Stopped
from harmonium.evals.item import Effort, Item, Reply, Verdict
from harmonium.evals.samples import Key, Sample, SampleFile, failed, judged
from harmonium.evals.task import Task

MAX_LOST_IN_A_ROW = 10
"""Items in a row that found nobody to answer: the server is gone, and the run may go on when it is back."""


@dataclass(frozen=True, slots=True)
class AskSettings:
    """model: name in the requests. max_tokens: by effort. seed: of the run; each sample draws its own from
    it.
    """

    model: str
    max_tokens: dict[Effort, int]
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Question:
    """One sample to be asked for."""

    item: Item
    effort: Effort
    number: int

    @property
    def key(self) -> Key:
        return (self.item.id, self.effort, self.number)


def choose_items(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """All of them, or `limit` drawn over the whole set by the seed, in the set's order."""
    if limit is None or limit >= len(items):
        return list(items)
    places = Random(seed).sample(range(len(items)), limit)
    return [items[place] for place in sorted(places)]


def questions(items: Sequence[Item], efforts: Sequence[Effort], samples: int) -> list[Question]:
    """All that a run asks, in order: by effort, then by sample, so that what comes first covers all items."""
    return [
        Question(item, effort, number)
        for effort in efforts
        for number in range(samples)
        for item in items
        if item.effort in (None, effort)
    ]


def request_body(question: Question, settings: AskSettings) -> dict[str, Any]:
    """The chat completion request of a question."""
    item = question.item
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": list(item.messages),
        "reasoning_effort": question.effort,
        "max_tokens": settings.max_tokens[question.effort],
        "temperature": settings.temperature,
        "seed": sample_seed(settings.seed, question.key),
    }
    if item.tools:
        body["tools"] = list(item.tools)
    if item.response_format is not None:
        body["response_format"] = dict(item.response_format)
    return body


def sample_seed(seed: int, key: Key) -> int:
    """A seed of its own for each sample (31 bits), the same in every run with this seed."""
    text = f"{seed} {key[0]} {key[1]} {key[2]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def judge_reply(task: Task, item: Item, reply: Reply) -> Verdict:
    """The task's verdict. An answer that was cut off or is empty is wrong, whatever stands in it."""
    if reply.is_truncated:
        return Verdict(False, None, "cut off at the longest answer")
    if reply.is_empty:
        return Verdict(False, None, "empty answer")
    return task.judge(item, reply)


def answer(client: ChatClient, task: Task, settings: AskSettings, question: Question) -> tuple[Sample, bool]:
    """The sample, and whether nobody was there to answer. Raises Stopped."""
    item, effort, number = question.item, question.effort, question.number
    try:
        reply = client.ask(request_body(question, settings))
        verdict = judge_reply(task, item, reply)
    except AskFailed as error:
        return failed(item, effort, number, str(error)), error.is_connection
    except Stopped:
        raise
    except Exception as error:  # a judge that fails on one answer says nothing about the others
        return failed(item, effort, number, f"the judge failed: {type(error).__name__}: {error}"), False
    return judged(item, effort, number, reply, verdict), False


def run_questions(
    asked: Sequence[Question],
    work: Callable[[Question], tuple[Sample, bool]],
    file: SampleFile,
    concurrency: int,
    progress: Callable[[Sample], None],
    stop: Callable[[], None],
) -> None:
    """Answer all questions, `concurrency` at a time, and write each sample as it comes.

    work: called in threads. progress: called in this one, after a sample is written. stop: called when the
    run ends early, so that waiting threads give up. Raises EngineError when the server is gone.
    """
    waiting: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Sample, bool] | BaseException] = queue.SimpleQueue()
    for question in [*asked, *[None] * concurrency]:
        waiting.put(question)
    ending = threading.Event()

    def worker() -> None:
        while not ending.is_set() and (question := waiting.get()) is not None:
            try:
                done.put(work(question))
            except Stopped:  # noqa: PERF203 - each question has its own end
                return
            except BaseException as error:
                done.put(error)
                return

    for _ in range(min(concurrency, len(asked))):
        threading.Thread(target=worker, daemon=True).start()
    try:
        lost_in_a_row = 0
        for _ in asked:
            outcome = done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            sample, is_lost = outcome
            file.add(sample)
            progress(sample)
            lost_in_a_row = lost_in_a_row + 1 if is_lost else 0
            if lost_in_a_row >= MAX_LOST_IN_A_ROW:
                raise EngineError(f"the run stops, --resume goes on with it: {sample.error}")
    finally:
        ending.set()
        stop()
