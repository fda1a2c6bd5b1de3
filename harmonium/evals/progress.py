"""How far a run is: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from harmonium.evals.report import duration
from harmonium.evals.samples import Sample

LINE_SECONDS = 30.0
"""Between two lines where stderr is no terminal."""


class _Counts:
    def __init__(self, planned: int, before: list[Sample]) -> None:
        self.planned, self.done = planned, len(before)
        self.right = sum(sample.result == "right" for sample in before)
        self.errors = 0
        self.judged = self.done
        self.started, self.at_start = time.monotonic(), self.done

    def add(self, sample: Sample) -> None:
        self.done += 1
        self.errors += sample.result == "error"
        self.judged += sample.result != "error"
        self.right += sample.result == "right"

    def text(self) -> str:
        shown = f"{100 * self.right / self.judged:.1f} % right" if self.judged else "-"
        return f"{shown}, {self.errors} errors" if self.errors else shown

    def seconds_left(self) -> float | None:
        fresh = self.done - self.at_start
        spent = time.monotonic() - self.started
        return (self.planned - self.done) * spent / fresh if fresh else None


@contextmanager
def progress(planned: int, before: list[Sample], out: TextIO) -> Iterator[Callable[[Sample], None]]:
    """To be called with each sample. planned: of the whole run. before: those that a resumed run has."""
    counts = _Counts(planned, before)
    if not out.isatty():
        yield _lines(counts, out)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=out), transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task(counts.text(), total=planned, completed=counts.done)

        def show(sample: Sample) -> None:
            counts.add(sample)
            bar.update(task, advance=1, description=counts.text())

        yield show


def _lines(counts: _Counts, out: TextIO) -> Callable[[Sample], None]:
    last = time.monotonic()

    def show(sample: Sample) -> None:
        nonlocal last
        counts.add(sample)
        if time.monotonic() - last < LINE_SECONDS:
            return
        last = time.monotonic()
        left = counts.seconds_left()
        remaining = f", about {duration(left)} left" if left is not None else ""
        print(f"{counts.done:,} of {counts.planned:,}: {counts.text()}{remaining}", file=out, flush=True)

    return show
