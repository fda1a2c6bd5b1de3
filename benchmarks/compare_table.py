"""The rounds of all sides, folded into lines: medians, extremes, ratios, limits; as JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compare_rows import Measured, Row

Round = Mapping[str, Measured]
"""By the name of the side; "ours" is always there."""


@dataclass(frozen=True)
class Line:
    """A row over all rounds. values: of each side that gave it; ratios: medians of the rounds' ratios."""

    row: Row
    values: dict[str, list[float]]
    ratios: dict[str, float]
    limit: float | None

    def to_json(self) -> dict[str, Any]:
        """limit: what bandwidth and operations allow our formats, from the same run; share: ours of it."""
        ours = statistics.median(self.values["ours"])
        return {
            "name": self.row.name,
            "kind": self.row.kind,
            "tokens": self.row.tokens,
            "depth": self.row.depth,
            "batch": self.row.batch,
            "unit": self.row.unit,
            "sides": {
                name: {
                    "median": statistics.median(values),
                    "low": min(values),
                    "high": max(values),
                    "values": values,
                }
                for name, values in self.values.items()
            },
            "ratios": self.ratios,
            "limit": self.limit,
            "share": None if self.limit is None else ours / self.limit,
        }


def lines_of(rounds: Sequence[Round]) -> list[Line]:
    """One line for each row that we gave, in the order in which it was measured; memory last."""
    rows = sorted(rounds[0]["ours"].values, key=lambda row: row.kind == "peak")
    lines = []
    for row in rows:
        values: dict[str, list[float]] = {}
        ratios: dict[str, float] = {}
        for name in rounds[0]:
            found = [one[name].values[row] for one in rounds if row in one[name].values]
            if len(found) == len(rounds):
                values[name] = found
        for name in values:
            if name != "ours":
                pairs = zip(values["ours"], values[name], strict=True)
                ratios[name] = statistics.median(row.ratio(ours, theirs) for ours, theirs in pairs)
        limits = [one["ours"].limits[row] for one in rounds if row in one["ours"].limits]
        lines.append(Line(row, values, ratios, statistics.median(limits) if limits else None))
    return lines


def machine(rounds: Sequence[Round]) -> dict[str, float]:
    """What the machine gave in our parts of the run: bytes and int8 operations a second."""
    bandwidth = [value for one in rounds for value in one["ours"].about.get("read_bandwidth", [])]
    operations = [value for one in rounds for value in one["ours"].about.get("int8_operations", [])]
    if not bandwidth:
        return {}
    return {
        "read_bandwidth": statistics.median(bandwidth),
        "read_bandwidth_low": min(bandwidth),
        "read_bandwidth_high": max(bandwidth),
        "int8_operations": statistics.median(operations),
    }


def report(settings: dict[str, Any], rounds: Sequence[Round]) -> dict[str, Any]:
    """What --json prints and --out keeps; benchmarks/plot.py draws it."""
    measured = ("read_bandwidth", "int8_operations", "ready_seconds")
    return {
        "settings": settings,
        "num_rounds": len(rounds),
        "machine": machine(rounds),
        "sides": {
            name: {key: value for key, value in side.about.items() if key not in measured}
            for name, side in rounds[-1].items()
        },
        "rows": [line.to_json() for line in lines_of(rounds)],
    }


def print_table(record: dict[str, Any]) -> None:
    sides = record["sides"]
    ours, limits = sides["ours"], record["machine"]
    head = f"{record['num_rounds']} rounds, {ours.get('threads', record['settings']['threads'])} threads"
    if limits:
        head += (
            f", {ours['isa']}, {ours['weights']} weights; reads {limits['read_bandwidth'] / 1e9:.1f} GB/s "
            f"({limits['read_bandwidth_low'] / 1e9:.1f} to {limits['read_bandwidth_high'] / 1e9:.1f}), "
            f"{limits['int8_operations'] / 1e9:.0f} G int8 operations/s"
        )
    print(head)
    peers = [name for name in sides if name != "ours"]
    titles = "".join(f"{name:>26}{'ratio':>7}" for name in peers)
    print(f"{'':<24}{'':<6}{'ours':>26}{titles}{'limit':>9}{'share':>7}")
    for row in record["rows"]:
        cells = f"{row['name']:<24}{row['unit']:<6}{_spread(row, 'ours'):>26}"
        for name in peers:
            ratio = row["ratios"].get(name)
            cells += f"{_spread(row, name):>26}{'-' if ratio is None else f'{ratio:.2f}':>7}"
        limit = "-" if row["limit"] is None else f"{row['limit']:.2f}"
        share = "-" if row["share"] is None else f"{row['share']:.0%}"
        print(f"{cells}{limit:>9}{share:>7}")


def _spread(row: dict[str, Any], side: str) -> str:
    """Median (least-greatest)."""
    found = row["sides"].get(side)
    if found is None:
        return "-"
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
