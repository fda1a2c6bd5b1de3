#!/usr/bin/env python3
"""The plots of docs/performance.md, from what benchmarks/compare.py kept.

    python -m benchmarks.plot RESULT.json [RESULT.json ...] [--out FOLDER]

Writes PNG files, one a question: prefill by length, decode by depth, sequences together, first token with and
without a cache, memory; a question that no row answers gets no file. Points are medians, bars go from the
least to the greatest, gray is what the machine allows our formats. Of several files, the later one's rows
count. Readable in black and white: each side has a marker, a line and a hatching of its own. Needs
harmonium[plot].
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# Okabe and Ito's colors, which people with color blindness tell apart; dark to light in gray.
STYLES = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
)
HATCHES = ("", "///", "...", "xxx")
FIRST_TOKEN = (("first token", "never seen"), ("first token again", "seen"), ("restarted", "seen, restarted"))


class PlotError(Exception):
    """What the user gave cannot be drawn."""


@dataclass(frozen=True)
class Results:
    """Rows by (kind, tokens, depth, batch), the sides in their order, and the line under each plot."""

    rows: dict[tuple[str, int, int, int], Record]
    sides: list[str]
    caption: str

    def of(self, kind: str) -> list[Record]:
        return sorted(
            (row for key, row in self.rows.items() if key[0] == kind),
            key=lambda row: (row["tokens"], row["depth"], row["batch"]),
        )


def read(paths: Sequence[Path]) -> Results:
    """Raises PlotError for a file that is not compare.py's."""
    rows: dict[tuple[str, int, int, int], Record] = {}
    sides: dict[str, None] = {"ours": None}
    captions: dict[str, None] = {}
    for path in paths:
        record = read_record(path)
        for row in record["rows"]:
            rows[row["kind"], row["tokens"], row["depth"], row["batch"]] = row
        sides |= dict.fromkeys(record["sides"])
        captions[caption_of(record)] = None
    return Results(rows, list(sides), "; ".join(captions))


def read_record(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        for row in record["rows"]:
            row["kind"], row["tokens"], row["depth"], row["batch"], row["unit"], row["limit"]
            row["sides"]["ours"]["median"]
        record["sides"], caption_of(record)
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PlotError(f"{path} is no result of benchmarks/compare.py --out") from None
    return record


def caption_of(record: Record) -> str:
    machine, settings = record["machine"], record["settings"]
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    text = f"{settings['checkpoint']}, {threads}, medians of {record['num_rounds']} rounds"
    if machine:
        text += f", {machine['read_bandwidth'] / 1e9:.0f} GB/s"
        text += f", {machine['int8_operations'] / 1e9:,.0f} G int8 operations/s"
    return text


def short(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_lines(axes: Any, results: Results, rows: Sequence[Record], axis: str) -> None:
    """Speed of each side over the rows' length, depth or batch; lengths stand evenly, named."""
    for index, side in enumerate(results.sides):
        points = [(place, row["sides"][side]) for place, row in enumerate(rows) if side in row["sides"]]
        if points:
            middle = [found["median"] for _, found in points]
            spread = [
                [found["median"] - found["low"] for _, found in points],
                [found["high"] - found["median"] for _, found in points],
            ]
            places = [place for place, _ in points]
            axes.errorbar(places, middle, spread, label=side, capsize=4, markersize=7, **STYLES[index])
            for place, value in zip(places, middle, strict=True):
                axes.annotate(
                    short(value),
                    (place, value),
                    (7, 5),
                    textcoords="offset points",
                    fontsize=9,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                )
    limits = [(place, row["limit"]) for place, row in enumerate(rows) if row["limit"] is not None]
    if limits:
        axes.plot(
            *zip(*limits, strict=True), color="gray", marker="_", markersize=14, label="machine's limit"
        )
    axes.set_xticks(range(len(rows)), [f"{row[axis]:,}" for row in rows])
    axes.set_xlim(-0.4, len(rows) - 0.4)  # room for the figures at the right of the last points
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("tokens a second")


def draw_bars(axes: Any, results: Results, groups: Sequence[tuple[str, Record]]) -> None:
    """A group of bars for each (name, row), a bar for each side that has it."""
    width = 0.8 / len(results.sides)
    for index, side in enumerate(results.sides):
        places, values = [], []
        for place, (_, row) in enumerate(groups):
            if side in row["sides"]:
                places.append(place + (index - (len(results.sides) - 1) / 2) * width)
                values.append(row["sides"][side]["median"])
        if places:
            color = STYLES[index]["color"]
            bars = axes.bar(
                places, values, width * 0.92, label=side, color=color, hatch=HATCHES[index], edgecolor="white"
            )
            axes.bar_label(bars, [short(value) for value in values], padding=2, fontsize=9)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.15)


def prefill(axes: Any, results: Results) -> bool:
    rows = results.of("prefill")
    if rows:
        draw_lines(axes, results, rows, "tokens")
        axes.set_title("Prefill")
        axes.set_xlabel("tokens of the prompt")
    return bool(rows)


def decode(axes: Any, results: Results) -> bool:
    rows = [row for row in results.of("decode") if row["batch"] == 1]
    if rows:
        draw_lines(axes, results, rows, "depth")
        axes.set_title("Decode, one sequence")
        axes.set_xlabel("tokens in the context before")
    return bool(rows)


def batch(axes: Any, results: Results) -> bool:
    rows = [row for row in results.of("decode") if row["batch"] > 1]
    if rows:
        draw_lines(axes, results, rows, "batch")
        axes.set_title(f"Decode, all sequences together (prompts of {rows[0]['depth']:,} tokens)")
        axes.set_xlabel("sequences")
    return bool(rows)


def first_token(axes: Any, results: Results) -> bool:
    groups = [(name, row) for kind, name in FIRST_TOKEN for row in results.of(kind)[-1:]]
    if groups:
        draw_bars(axes, results, groups)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel("seconds")
        axes.set_title(f"First token of a prompt of {groups[0][1]['tokens']:,} tokens")
    return bool(groups)


def memory(axes: Any, results: Results) -> bool:
    rows = results.of("peak")
    if rows:
        draw_bars(axes, results, [("", row) for row in rows])
        axes.set_ylabel("GiB")
        axes.set_title("Resident memory at its peak")
    return bool(rows)


PLOTS: dict[str, Callable[[Any, Results], bool]] = {
    "prefill": prefill,
    "decode": decode,
    "batch": batch,
    "first-token": first_token,
    "memory": memory,
}


def draw(results: Results, folder: Path) -> list[Path]:
    """The files written. Raises PlotError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("matplotlib is missing: pip install 'harmonium[plot]'") from None
    if len(results.sides) > len(STYLES):
        raise PlotError(f"there are {len(results.sides)} sides; at most {len(STYLES)} can be told apart")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in PLOTS.items():
        figure = Figure(figsize=(7, 4.4), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        if not plot(axes, results):
            continue
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="best")
        figure.supxlabel(results.caption, fontsize=7, color="#444444")
        path = folder / f"{name}.png"
        figure.savefig(path, metadata={"Software": None})
        written.append(path)
    return written


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, default=Path("docs/plots"), metavar="FOLDER", help="(docs/plots)")
    arguments = parser.parse_args(argv)
    try:
        written = draw(read(arguments.results), arguments.out)
    except PlotError as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
