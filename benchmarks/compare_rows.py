"""What compare.py measures: rows, the wish that selects them, and what a side gave in one round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from harmonium.errors import ConfigError

Kind = Literal[
    "prefill",
    "decode",
    "same",
    "first token",
    "first token again",
    "restarted",
    "ready",
    "ready again",
    "peak",
]
Group = Literal["start", "prefill", "depth", "batch", "first token"]
GROUPS: tuple[Group, ...] = ("start", "prefill", "depth", "batch", "first token")
"""The order of a round. All sides measure a group before any of them measures the next."""


@dataclass(frozen=True, order=True)
class Row:
    """One line of the table.

    tokens: of the prompt, or given to each sequence (decode, same). depth: of each sequence's prompt before.
    "same": a decode in which all sequences say the same, so that they choose the same experts. "first token":
    of a prompt never seen; "again": of the same prompt at once; "restarted": in a new process.
    """

    kind: Kind
    tokens: int = 0
    depth: int = 0
    batch: int = 1

    @property
    def unit(self) -> str:
        return (
            "tok/s" if self.kind in ("prefill", "decode", "same") else "GiB" if self.kind == "peak" else "s"
        )

    @property
    def name(self) -> str:
        if self.kind == "peak":
            return "peak resident"
        if self.kind in ("ready", "ready again"):
            return self.kind
        if self.kind in ("decode", "same"):
            streams = f" x{self.batch}" if self.batch > 1 else ""
            return f"{self.kind}{streams} at {self.depth:,}"
        return f"{self.kind} {self.tokens:,}"

    def ratio(self, ours: float, theirs: float) -> float:
        """Over 1 when ours is better: more tokens a second, or fewer seconds and bytes."""
        return ours / theirs if self.unit == "tok/s" else theirs / ours


@dataclass(frozen=True)
class Wish:
    """Which rows. prefill: prompt lengths; decode: tokens of one measurement, at each depth and each batch.

    batch_depth: prompt of each sequence of a batch. first_token: length of that prompt, 0 for none. start:
    whether to time the start. same: whether a side is there that can only give "same" rows.
    """

    prefill: tuple[int, ...] = (512,)
    decode: int = 64
    depth: tuple[int, ...] = (0,)
    batch: tuple[int, ...] = ()
    batch_depth: int = 32
    first_token: int = 0
    start: bool = False
    same: bool = False

    def __post_init__(self) -> None:
        values = [("--prefill", n, 1) for n in self.prefill] + [("--depth", n, 0) for n in self.depth]
        values += [("--batch", n, 2) for n in self.batch] + [("--decode", self.decode, 1)]
        values += [("--batch-depth", self.batch_depth, 1), ("--first-token", self.first_token, 0)]
        for option, value, least in values:
            if value < least:
                raise ConfigError(f"{option} has {value}; expected at least {least}")
        if not self.groups():
            raise ConfigError(
                "no row is left: give one of --prefill, --depth, --batch, --first-token, --start"
            )

    def groups(self) -> list[Group]:
        has = {
            "start": self.start,
            "prefill": bool(self.prefill),
            "depth": bool(self.depth),
            "batch": bool(self.batch),
            "first token": self.first_token > 0,
        }
        return [group for group in GROUPS if has[group]]


@dataclass
class Measured:
    """What a side gave: values in the row's unit, its own limits, bytes of memory at the peak, what it is."""

    values: dict[Row, float] = field(default_factory=dict)
    limits: dict[Row, float] = field(default_factory=dict)
    peak_bytes: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Measured) -> None:
        self.values |= other.values
        self.limits |= other.limits
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        bandwidth = "read_bandwidth"
        for name, value in other.about.items():
            # Each group measures the machine; all of them are kept.
            if name in (bandwidth, "int8_operations"):
                self.about.setdefault(name, []).extend(value)
            else:
                self.about[name] = value

    def finish(self) -> None:
        """Peak memory becomes a row, once all groups are in. 0: this side's memory cannot be seen."""
        if self.peak_bytes:
            self.values[Row("peak")] = self.peak_bytes / 2**30


class Side(Protocol):
    """Somebody who runs the model."""

    name: str

    def measure(self, group: Group, wish: Wish) -> Measured:
        """The rows of this group that it can give: none where it has no program for them."""
        ...


def shortened(wish: Wish, longest: int) -> Wish:
    """The wish without what is longer than `longest` tokens, which may leave nothing."""
    return Wish(
        prefill=fitting(wish.prefill, longest),
        decode=wish.decode,
        depth=fitting(wish.depth, longest),
        batch=wish.batch,
        batch_depth=wish.batch_depth,
        first_token=wish.first_token if wish.first_token <= longest else 0,
        start=wish.start,
        same=wish.same,
    )


def fitting(lengths: Sequence[int], longest: int) -> tuple[int, ...]:
    return tuple(length for length in lengths if length <= longest)
