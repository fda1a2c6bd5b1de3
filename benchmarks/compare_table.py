"""The rounds of both sides, folded into lines: medians, extremes, ratios, limits."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compare_peer import Key, Measured


@dataclass(frozen=True)
class Comparison:
    """A line of the table: medians with the extremes, and the median of the rounds' ratios."""

    name: str
    unit: str
    ours: float
    ours_low: float
    ours_high: float
    theirs: float | None
    theirs_low: float | None
    theirs_high: float | None
    ratio: float | None
    limit: float | None


def comparisons(ours: Sequence[Measured], theirs: Sequence[Measured]) -> list[Comparison]:
    """One line for each speed, for the time until ready and for the peak memory, over all rounds."""
    limits = {
        key: statistics.median([limit_of(measured, key) for measured in ours]) for key in ours[0].speeds
    }
    table = []
    for key in ours[0].speeds:
        kind, num_tokens, depth = key
        name = f"prefill {num_tokens:,}" if kind == "prefill" else f"decode at {depth:,}"
        their_values = [measured.speeds[key] for measured in theirs if key in measured.speeds]
        table.append(compare(name, "tok/s", [m.speeds[key] for m in ours], their_values, limits[key]))
    for index, name in enumerate(("ready", "ready again")):
        their_values = [measured.ready[index] for measured in theirs if measured.ready]
        table.append(compare(name, "s", [measured.ready[index] for measured in ours], their_values, None))
    peaks = [[m.peak_resident_bytes / 2**30 for m in side] for side in (ours, theirs)]
    table.append(compare("peak resident", "GiB", peaks[0], peaks[1], None))
    return table


def limit_of(measured: Measured, key: Key) -> float:
    rows = measured.about["rows"]
    return float(next(row["limit"] for row in rows if (row["kind"], row["num_tokens"], row["depth"]) == key))


def compare(
    name: str, unit: str, ours: Sequence[float], theirs: Sequence[float], limit: float | None
) -> Comparison:
    """theirs may be empty. A ratio over 1 is in our favor: more speed, or fewer seconds and bytes."""
    ratio = None
    if len(theirs) == len(ours):
        is_speed = unit == "tok/s"
        pairs = zip(ours, theirs, strict=True)
        ratio = statistics.median(our / their if is_speed else their / our for our, their in pairs)
    return Comparison(
        name,
        unit,
        ours=statistics.median(ours),
        ours_low=min(ours),
        ours_high=max(ours),
        theirs=statistics.median(theirs) if theirs else None,
        theirs_low=min(theirs, default=None),
        theirs_high=max(theirs, default=None),
        ratio=ratio,
        limit=limit,
    )


def report(
    arguments: argparse.Namespace, rounds: Sequence[tuple[Measured, Measured]], table: Sequence[Comparison]
) -> dict[str, Any]:
    return {
        "machine": machine(rounds),
        "threads": rounds[0][0].about["threads"],
        "llama_arguments": arguments.llama_arguments,
        "llama_build": rounds[0][1].about,
        "rows": [asdict(row) for row in table],
        "rounds": [{"ours": ours.about, "theirs": speeds_json(theirs)} for ours, theirs in rounds],
    }


def speeds_json(measured: Measured) -> dict[str, Any]:
    rows = [
        {"kind": kind, "num_tokens": tokens, "depth": depth, "tokens_per_second": speed}
        for (kind, tokens, depth), speed in measured.speeds.items()
    ]
    return {
        "rows": rows,
        "ready_seconds": measured.ready,
        "peak_resident_bytes": measured.peak_resident_bytes,
    }


def machine(rounds: Sequence[tuple[Measured, Measured]]) -> dict[str, float]:
    """What the machine gave in our parts of the run."""
    abouts = [ours.about for ours, _ in rounds]
    return {
        "read_bandwidth": statistics.median(about["read_bandwidth"] for about in abouts),
        "read_bandwidth_low": min(about["read_bandwidth_low"] for about in abouts),
        "read_bandwidth_high": max(about["read_bandwidth_high"] for about in abouts),
        "int8_operations": statistics.median(about["int8_operations"] for about in abouts),
    }


def print_table(rounds: Sequence[tuple[Measured, Measured]], table: Sequence[Comparison]) -> None:
    limits, about = machine(rounds), rounds[0][0].about
    print(
        f"{len(rounds)} rounds, {about['threads']} threads, {about['isa']}, {about['weights']} weights; "
        f"reads {limits['read_bandwidth'] / 1e9:.1f} GB/s ({limits['read_bandwidth_low'] / 1e9:.1f} to "
        f"{limits['read_bandwidth_high'] / 1e9:.1f}), "
        f"{limits['int8_operations'] / 1e9:.0f} G int8 operations/s"
    )
    print(
        "{:<16}{:<6}{:>27}{:>27}{:>8}{:>9}{:>7}".format("", "", "ours", "theirs", "ratio", "limit", "share")
    )
    for row in table:
        ours = f"{row.ours:.2f} ({row.ours_low:.2f}-{row.ours_high:.2f})"
        theirs = (
            "-" if row.theirs is None else f"{row.theirs:.2f} ({row.theirs_low:.2f}-{row.theirs_high:.2f})"
        )
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        limit, share = (
            ("-", "-") if row.limit is None else (f"{row.limit:.2f}", f"{row.ours / row.limit:.0%}")
        )
        print(f"{row.name:<16}{row.unit:<6}{ours:>27}{theirs:>27}{ratio:>8}{limit:>9}{share:>7}")
