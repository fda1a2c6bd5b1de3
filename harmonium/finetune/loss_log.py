"""What each step was: loss.csv, its plot, TensorBoard's events, and the progress on a terminal."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from harmonium.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step, and a line of loss.csv. step: from 1. loss: the mean over its loss tokens, before the step.

    validation_loss: after the step, where one was due. balance: 1.0 when the experts are used evenly.
    seconds: of the step, its validation included.
    """

    step: int
    epoch: int
    loss: float
    validation_loss: float | None
    balance: float | None
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    num_loss_tokens: int
    seconds: float


COLUMNS = tuple(field.name for field in fields(StepRow))


class LossLog:
    """loss.csv, a line a step. Raises ConfigError when it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self) -> None:
        """A new file with the columns' names."""
        self._write([list(COLUMNS)], "w")

    def go_on(self, step: int) -> None:
        """Keep the lines up to this step: those behind it will be made again."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        self._write([list(COLUMNS), *([row[name] for name in COLUMNS] for row in kept)], "w")

    def add(self, row: StepRow) -> None:
        """One more line."""
        values = [getattr(row, name) for name in COLUMNS]
        self._write([["" if value is None else value for value in values]], "a")

    def rows(self) -> list[dict[str, str]]:
        """The lines as text by column; a line that was cut by a kill is left out."""
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                return [row for row in csv.DictReader(file) if None not in row.values()]
        except OSError:
            return []

    def _write(self, rows: list[list[Any]], mode: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror or error})") from None


def plot(log: LossLog, target: Path) -> str | None:
    """Draw the losses to a PNG file; returns why not, where matplotlib is missing or fails."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss.png: matplotlib is missing (pip install 'harmonium[train]'); loss.csv has the numbers"
    rows = log.rows()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(
        [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], label="training", lw=1
    )
    held = [row for row in rows if row["validation_loss"]]
    if held:
        values = [float(row["validation_loss"]) for row in held]
        axes.plot([int(row["step"]) for row in held], values, "o-", label="validation", ms=3)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        return f"no loss.png: {error.strerror or error}"
    return None


def tensorboard_writer(folder: Path) -> Callable[[StepRow], None]:
    """A function that writes a step's numbers as events. Raises ConfigError when tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    writer = SummaryWriter(str(folder))

    def write(row: StepRow) -> None:
        for name in ("loss", "validation_loss", "balance", "learning_rate", "gradient_norm"):
            value = getattr(row, name)
            if value is not None:
                writer.add_scalar(name, value, row.step)
        writer.flush()

    return write


LINES_EVERY = 10.0
"""Seconds between lines where nobody watches a bar."""


@contextmanager
def step_progress() -> Iterator[Callable[[StepRow, int], None]]:
    """A bar on stderr with loss, tokens/s and the time left; plain lines where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield _line_printer()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=None)

        def show(row: StepRow, total: int) -> None:
            speed = row.num_tokens / max(row.seconds, 1e-9)
            held = "" if row.validation_loss is None else f"  validation {row.validation_loss:.4f}"
            if held:
                bar.console.print(f"step {row.step}: loss {row.loss:.4f}{held}")
            bar.update(
                task,
                completed=row.step,
                total=total,
                description=f"loss {row.loss:.4f}  {speed:,.0f} tokens/s",
            )

        yield show


def _line_printer() -> Callable[[StepRow, int], None]:
    last = 0.0
    spent = num_steps = 0.0

    def show(row: StepRow, total: int) -> None:
        nonlocal last, spent, num_steps
        spent, num_steps = spent + row.seconds, num_steps + 1
        is_due = time.monotonic() - last >= LINES_EVERY
        if not (is_due or row.validation_loss is not None or row.step == total):
            return
        last = time.monotonic()
        held = "" if row.validation_loss is None else f", validation {row.validation_loss:.4f}"
        left = spent / num_steps * (total - row.step)
        speed = row.num_tokens / max(row.seconds, 1e-9)
        print(
            f"step {row.step}/{total}: loss {row.loss:.4f}{held}, {speed:,.0f} tokens/s, {left:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return show
