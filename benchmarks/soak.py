#!/usr/bin/env python3
"""A long run of mixed good and bad requests: memory stays flat, no undeclared 5xx, every request ends.

    python benchmarks/soak.py [--minutes 15] [--concurrency 32] [--model tiny]
    python benchmarks/soak.py --disconnects 500 [--model tiny]

The server is a process of its own over a tiny checkpoint with random weights and the native engine. Each of
the clients takes one kind of request after the other by chance (seeded). A fault is a status that the kind
does not declare, a 5xx other than a 503 with Retry-After, a stream without its last event, or a request that
takes longer than two minutes; any makes the exit code 1. Memory is the server's resident set: its slope is
that of a line through the samples after the first third.

--disconnects: instead, so many clients leave at random points (benchmarks/disconnects.py).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from soak_requests import KINDS, Connection, Kind, Outcome  # beside this file

LIMIT_SECONDS = 120.0


@dataclass
class Record:
    """What the run has seen so far."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    resident: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, MiB)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--model", default="tiny", help="a checkpoint folder (default: the tiny model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disconnects", type=int, metavar="N", help="only let N clients leave")
    options = parser.parse_args()
    if options.disconnects is not None:
        from disconnects import report_departures

        return report_departures(options.disconnects, options.model, options.seed)
    with serving(options.model) as (port, pid):
        record = asyncio.run(soak(port, pid, options))
        left = asyncio.run(idle_gauges(port))
    return report(record, left, options)


async def soak(port: int, pid: int, options: argparse.Namespace) -> Record:
    """Run all clients until the time is over, and let the requests that run end."""
    record = Record()
    began = time.monotonic()
    end = began + options.minutes * 60
    watcher = asyncio.create_task(watch(pid, began, record))
    clients = (
        run_client(port, random.Random(options.seed * 1000 + number), end, record)
        for number in range(options.concurrency)
    )
    await asyncio.gather(*clients)
    watcher.cancel()
    return record


async def run_client(port: int, chance: random.Random, end: float, record: Record) -> None:
    """One request after the other."""
    weights = [kind.weight for kind in KINDS]
    while time.monotonic() < end:
        kind = chance.choices(KINDS, weights)[0]
        connection = Connection(port, chance)
        try:
            outcome = await asyncio.wait_for(kind.send(connection), LIMIT_SECONDS)
        except asyncio.TimeoutError:
            record.faults.append(f"{kind.name}: no end within {LIMIT_SECONDS:g} s")
            continue
        except (OSError, EOFError, ValueError) as error:
            record.faults.append(f"{kind.name}: {type(error).__name__}: {error}")
            continue
        finally:
            connection.close()
        judge(kind, outcome, record)
        if outcome.retries_after:
            await asyncio.sleep(chance.random())


def judge(kind: Kind, outcome: Outcome, record: Record) -> None:
    """Count it, and note what is wrong with it."""
    record.statuses[kind.name, outcome.status] += 1
    is_declared = outcome.status in (429, 503) and outcome.retries_after
    if outcome.status not in kind.expected and not is_declared:
        record.faults.append(f"{kind.name}: {outcome.status} {outcome.body[:300]!r}")
    elif outcome.complaint:
        record.faults.append(f"{kind.name}: {outcome.complaint}: {outcome.body[-300:]!r}")


async def watch(pid: int, began: float, record: Record) -> None:
    """The server's memory, every few seconds."""
    while True:
        record.resident.append((time.monotonic() - began, resident_mib(pid)))
        await asyncio.sleep(2.0)


def resident_mib(pid: int) -> float:
    """VmRSS of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


async def idle_gauges(port: int) -> dict[str, float]:
    """Gauges that must be 0 when nobody asks any more; read until they are, for at most ten seconds."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    gauges: dict[str, float] = {}
    for _ in range(50):
        connection = Connection(port, random.Random(0))
        text = (await connection.ask("GET", "/metrics")).body.decode()
        connection.close()
        for name in (*names, "harmonium:window_blocks_used"):
            found = re.search(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
            gauges[name] = float(found[1]) if found else float("nan")
        if not any(gauges.values()):
            break
        await asyncio.sleep(0.2)
    return gauges


def report(record: Record, left: dict[str, float], options: argparse.Namespace) -> int:
    """Print what was seen; the exit code."""
    total = sum(record.statuses.values())
    by_status: Counter[int] = Counter()
    for (_, status), count in record.statuses.items():
        by_status[status] += count
    seconds, mib = zip(*record.resident, strict=True)
    warm = record.resident[len(record.resident) // 3 :]
    slope = statistics.linear_regression(*zip(*warm, strict=True)).slope * 60 if len(warm) > 2 else 0.0
    print(f"{total:,} requests in {seconds[-1] / 60:.1f} min at concurrency {options.concurrency}")
    print("statuses: " + ", ".join(f"{status}: {count:,}" for status, count in sorted(by_status.items())))
    print(
        f"resident: {mib[0]:.0f} MiB at first, {warm[0][1]:.0f} after warm-up, {mib[-1]:.0f} at the end, "
        f"most {max(mib):.0f}; slope after warm-up {slope:+.2f} MiB/min"
    )
    gap = max(later - earlier for earlier, later in itertools.pairwise(seconds)) if len(seconds) > 1 else 0.0
    print(f"longest time between two samples of memory: {gap:.0f} s (2 unless everything was stopped)")
    print("left: " + ", ".join(f"{name} {value:g}" for name, value in left.items()))
    for (name, status), count in sorted(record.statuses.items()):
        print(f"  {name:28} {status} {count:6,}")
    print(f"faults: {len(record.faults)}")
    for fault, count in Counter(record.faults).most_common(20):
        print(f"  {count:5} {fault}")
    return 1 if record.faults or any(left.values()) else 0


@contextmanager
def serving(model: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of `harmonium serve`."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "harmonium", "serve", model, "--port", "0", "--context-length", "2048"]
    command += ["--max-concurrency", "8", "--max-queue", "24", "--threads", "1", "--memory-limit", "1GiB"]
    # In memory the stored responses would grow to their limit, a GiB.
    folder = tempfile.TemporaryDirectory()
    command += ["--store", str(Path(folder.name) / "responses.sqlite")]
    log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed below
    process = subprocess.Popen(command, stderr=log, env={**os.environ, "PYTHONPATH": path})
    try:
        yield wait_for_port(process, log), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.seek(0)
        defects = [line for line in log if "Traceback" in line or " ERROR " in line]
        log.close()
        folder.cleanup()
        print(f"error lines in the server's log: {len(defects)}")
        print("".join(defects[:10]), end="")


def wait_for_port(process: subprocess.Popen[bytes], log: IO[str]) -> int:
    """The port that the server announces; returns when it is ready."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        text = Path(f"/proc/self/fd/{log.fileno()}").read_text(encoding="utf-8")
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", text)
        if found and "ready: " in text:
            return int(found[1])
        time.sleep(0.1)
    raise RuntimeError("the server did not get ready")


if __name__ == "__main__":
    raise SystemExit(main())
