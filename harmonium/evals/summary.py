"""What a run found, by effort and by group: the numbers of every report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harmonium.evals.intervals import Accuracy, accuracy
from harmonium.evals.item import EFFORTS, Effort
from harmonium.evals.samples import Sample


@dataclass(frozen=True, slots=True)
class Group:
    """A subject or skill. accuracy: None when all of it ended in errors."""

    name: str
    samples: int
    accuracy: Accuracy | None


@dataclass(frozen=True, slots=True)
class EffortSummary:
    """One effort, or all of them.

    samples: judged ones; errors are not among them. truncated and empty ones count as wrong. answer_tokens:
    those written besides the reasoning (headers of the format too). *_tokens: mean of a sample, None where
    the server counted nothing; max_tokens: of the longest sample. tokens_per_second: median of a sample's
    tokens over its whole time, waiting for a place among others included; total_tokens_per_second: all tokens
    over the time in which any was being answered. seconds: that time. first_token_seconds: median.
    """

    effort: str
    items: int
    samples: int
    accuracy: Accuracy | None
    right: int
    truncated: int
    empty: int
    errors: int
    completion_tokens: float | None
    reasoning_tokens: float | None
    answer_tokens: float | None
    longest_tokens: int | None
    tokens_per_second: float | None
    total_tokens_per_second: float | None
    first_token_seconds: float | None
    seconds: float
    retries: int
    is_reasoning_counted: bool
    groups: tuple[Group, ...]

    def to_json(self) -> dict[str, Any]:
        """As report.json holds it."""
        return asdict(self)


def summarize(samples: Sequence[Sample]) -> list[EffortSummary]:
    """A summary of each effort that occurs, in their order, and one of all where there are several."""
    efforts: list[Effort] = [e for e in EFFORTS if any(sample.effort == e for sample in samples)]
    found = [_summary(effort, [s for s in samples if s.effort == effort]) for effort in efforts]
    return [*found, _summary("all", samples)] if len(efforts) > 1 else found


def _summary(effort: str, samples: Sequence[Sample]) -> EffortSummary:
    judged = [sample for sample in samples if sample.result != "error"]
    replies = [sample.reply for sample in judged if sample.reply is not None]
    completion = [r.completion_tokens for r in replies if r.completion_tokens is not None]
    reasoning = [r.reasoning_tokens for r in replies if r.reasoning_tokens is not None]
    answer = [
        max(0, r.completion_tokens - r.reasoning_tokens)
        for r in replies
        if r.completion_tokens is not None and r.reasoning_tokens is not None
    ]
    speeds = [r.completion_tokens / r.seconds for r in replies if r.completion_tokens and r.seconds > 0]
    seconds = busy_seconds((s.at - s.reply.seconds, s.at) for s in judged if s.reply is not None)
    names = sorted({sample.group for sample in samples} - {""})
    return EffortSummary(
        effort=effort,
        items=len({sample.id for sample in samples}),
        samples=len(judged),
        accuracy=_accuracy(judged),
        right=sum(sample.result == "right" for sample in judged),
        truncated=sum(r.is_truncated for r in replies),
        empty=sum(r.is_empty for r in replies),
        errors=len(samples) - len(judged),
        completion_tokens=_mean(completion),
        reasoning_tokens=_mean(reasoning),
        answer_tokens=_mean(answer),
        longest_tokens=max(completion, default=None),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        total_tokens_per_second=sum(completion) / seconds if completion and seconds > 0 else None,
        first_token_seconds=_median([r.first_token_seconds for r in replies]),
        seconds=seconds,
        retries=sum(r.retries for r in replies),
        is_reasoning_counted=all(r.is_reasoning_counted for r in replies),
        groups=tuple(_group(name, samples) for name in names),
    )


def _group(name: str, samples: Sequence[Sample]) -> Group:
    judged = [sample for sample in samples if sample.group == name and sample.result != "error"]
    return Group(name, len(judged), _accuracy(judged))


def _accuracy(judged: Sequence[Sample]) -> Accuracy | None:
    by_item: dict[str, list[int]] = {}
    for sample in judged:
        counts = by_item.setdefault(sample.id, [0, 0])
        counts[0] += sample.result == "right"
        counts[1] += 1
    return accuracy([(right, count) for right, count in by_item.values()])


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of the spans: a run that was resumed did not work in between."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _mean(values: Sequence[int]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
