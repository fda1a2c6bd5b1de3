"""What `harmonium bench` found: rows, the report around them, and the table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TextIO

from harmonium.config import Weights
from harmonium.model.costs import Bound


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of the table; speeds in tokens a second, of all sequences together.

    num_tokens: of the prompt (prefill), or given to each sequence (decode). depth: tokens that a sequence's
    prompt had (decode); context: those it really had in the middle of the measurements. low, high: the
    slowest and fastest measurement. limit: what bandwidth or operations (bound says which) allow.
    """

    kind: Literal["prefill", "decode"]
    num_tokens: int
    depth: int
    batch: int
    context: float
    tokens_per_second: float
    low: float
    high: float
    limit: float
    bound: Bound

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.tokens_per_second / self.limit


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All rows of a run. load_seconds: until the engine stood; ready_seconds: until it had given a token.

    peak_resident_bytes: of the whole process, the mapped weights that were touched included. Bandwidth (bytes
    a second) and operations (a second) are medians over the run, low and high their extremes.
    """

    model: str
    weights: Weights
    isa: str
    threads: int
    context_length: int
    load_seconds: float
    ready_seconds: float
    peak_resident_bytes: int
    read_bandwidth: float
    read_bandwidth_low: float
    read_bandwidth_high: float
    int8_operations: float
    num_preemptions: int
    rows: tuple[BenchRow, ...]

    def to_json(self) -> dict[str, object]:
        """For `--json`: the fields, and each row with its share of the limit."""
        record = asdict(self)
        record["rows"] = [{**asdict(row), "share": row.share} for row in self.rows]
        return record


def print_report(report: BenchReport, out: TextIO) -> None:
    """The table for people."""
    print(
        f"{report.model}: {report.weights} weights, {report.isa}, {report.threads} threads, "
        f"context {report.context_length:,}",
        file=out,
    )
    print(
        f"loaded in {report.load_seconds:.1f} s, first token after {report.ready_seconds:.1f} s, "
        f"peak resident {report.peak_resident_bytes / 2**30:.2f} GiB",
        file=out,
    )
    print(
        f"this machine: reads {report.read_bandwidth / 1e9:.1f} GB/s "
        f"({report.read_bandwidth_low / 1e9:.1f} to {report.read_bandwidth_high / 1e9:.1f}), "
        f"{report.int8_operations / 1e9:.0f} G int8 operations/s",
        file=out,
    )
    heads = ("row", "batch", "context", "tokens/s", "low", "high", "limit", "share", "bound by")
    print("{:<18} {:>5} {:>8} {:>9} {:>9} {:>9} {:>9} {:>6}  {}".format(*heads), file=out)
    for row in report.rows:
        name = f"prefill {row.num_tokens:,}" if row.kind == "prefill" else f"decode at {row.depth:,}"
        print(
            f"{name:<18} {row.batch:>5} {row.context:>8,.0f} {row.tokens_per_second:>9.2f} {row.low:>9.2f} "
            f"{row.high:>9.2f} {row.limit:>9.2f} {row.share:>6.0%}  {row.bound}",
            file=out,
        )
    if report.num_preemptions:
        print(f"{report.num_preemptions} preemptions: the cache was too small for some rows", file=out)
