"""The report of a run: its settings, summaries and the published figures, as JSON and on a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from harmonium.evals.intervals import Accuracy
from harmonium.evals.published import SOURCE, Published, published
from harmonium.evals.samples import Sample
from harmonium.evals.summary import EffortSummary, summarize
from harmonium.text_file import write_text

INTERVAL_NOTE = (
    "95 % interval: Wilson's, at the effective number of samples where an item has several "
    "(its samples are one cluster)"
)


@dataclass(frozen=True, slots=True)
class Report:
    """title: of the task. group_name: of its groups. settings: of the run. planned: samples of the whole run.
    samples: those that are there.
    """

    task: str
    title: str
    group_name: str
    settings: Mapping[str, Any]
    planned: int
    samples: Sequence[Sample]
    summaries: Sequence[EffortSummary]
    published: Sequence[Published]

    def to_json(self) -> dict[str, Any]:
        """Accuracies are shares of 1, published ones percent as printed in the source; times are seconds."""
        return {
            "task": self.task,
            "title": self.title,
            "settings": dict(self.settings),
            "planned_samples": self.planned,
            "interval": INTERVAL_NOTE,
            "efforts": [summary.to_json() for summary in self.summaries],
            "published": {"source": SOURCE, "figures": [asdict(figure) for figure in self.published]}
            if self.published
            else None,
        }


def make_report(
    task: str,
    title: str,
    group_name: str,
    settings: Mapping[str, Any],
    planned: int,
    samples: Sequence[Sample],
) -> Report:
    """The report of these samples."""
    return Report(task, title, group_name, settings, planned, samples, summarize(samples), published(task))


def write_report(report: Report, folder: Path) -> None:
    """report.json and report.html in this folder. Raises ConfigError when they cannot be written."""
    from harmonium.evals.page import page

    text = json.dumps(report.to_json(), ensure_ascii=False, indent=2) + "\n"
    write_text(folder / "report.json", text, may_replace=True)
    write_text(folder / "report.html", page(report), may_replace=True)


def percent(accuracy: Accuracy | None) -> str:
    """'83.3 %', '-' for None."""
    return "-" if accuracy is None else f"{100 * accuracy.value:.1f} %"


def interval(accuracy: Accuracy | None) -> str:
    """'80.1 to 86.2', '' for None."""
    return "" if accuracy is None else f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"


def amount(value: float | None, digits: int = 0) -> str:
    """A number with thousands separated, '-' for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def share(count: int, total: int) -> str:
    """'3 (1.5 %)', '0' for none."""
    return f"{count:,} ({100 * count / total:.1f} %)" if count and total else f"{count:,}"


def duration(seconds: float) -> str:
    """'58 s', '12 min', '3 h 05 min'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def print_report(report: Report, out: TextIO) -> None:
    """Tables of the result, the groups and the published figures."""
    from rich.console import Console

    console = Console(file=out, width=None if out.isatty() else 132, highlight=False, soft_wrap=False)
    console.print(f"{report.title}: {report.settings['model']}", style="bold", markup=False)
    console.print(_result_table(report))
    if len(groups := report.summaries[-1].groups if report.summaries else ()) > 1:
        table = _table(report.group_name, "samples", "accuracy", "95 %")
        for group in groups:
            table.add_row(group.name, f"{group.samples:,}", percent(group.accuracy), interval(group.accuracy))
        console.print(table)
    if report.published:
        table = _table("published", "effort", "accuracy", "")
        for figure in report.published:
            table.add_row(figure.model, figure.effort, f"{figure.percent:.1f} %", figure.remark)
        console.print(table)
        console.print(f"source: {SOURCE}", style="dim", markup=False)
    console.print(INTERVAL_NOTE, style="dim", markup=False)


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


def _result_table(report: Report) -> Any:
    table = _table(
        "effort", "samples", "accuracy", "95 %", "tokens", "reasoning", "cut off", "empty", "errors",
        "tok/s", "time",
    )  # fmt: skip
    for row in report.summaries:
        table.add_row(
            row.effort,
            f"{row.samples:,}",
            percent(row.accuracy),
            interval(row.accuracy),
            amount(row.completion_tokens),
            amount(row.reasoning_tokens),
            share(row.truncated, row.samples),
            share(row.empty, row.samples),
            f"{row.errors:,}",
            amount(row.total_tokens_per_second, 1),
            duration(row.seconds),
        )
    return table
