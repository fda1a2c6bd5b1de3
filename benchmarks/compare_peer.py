"""One round of llama.cpp: its programs started, timed, and what they print read."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from harmonium.errors import HarmoniumError

Key = tuple[str, int, int]
"""("prefill", tokens, 0) or ("decode", tokens, depth)."""


class PeerError(HarmoniumError):
    """The other program failed, or said what cannot be read."""


@dataclass(frozen=True)
class Measured:
    """One round of one side. speeds: tokens a second; ready: seconds, once or twice."""

    speeds: dict[Key, float]
    ready: list[float]
    peak_resident_bytes: int
    about: dict[str, Any] = field(default_factory=dict)


def measure_theirs(arguments: argparse.Namespace, threads: int) -> Measured:
    base = [
        str(arguments.llama_bench),
        *("-m", str(arguments.gguf), "-r", "1", "-t", str(threads), "-o", "json"),
        *arguments.llama_arguments,
    ]
    prefill, depth = joined(arguments.prefill), joined(arguments.depth)
    if arguments.depth == [0]:
        parts = [["-p", prefill, "-n", str(arguments.decode), "-d", "0"]]
    else:  # apart, for llama-bench would measure each prompt at each depth too
        parts = [["-p", prefill, "-n", "0", "-d", "0"], ["-p", "0", "-n", str(arguments.decode), "-d", depth]]
    speeds: dict[Key, float] = {}
    peak = 0
    about: dict[str, Any] = {}
    for part in parts:
        output, part_peak = run_program([*base, *part], "llama-bench", arguments.timeout)
        peak = max(peak, part_peak)
        for row in read_rows(output):
            about = {name: row.get(name) for name in ("build_commit", "build_number", "model_type")}
            is_prefill = row["n_prompt"] > 0
            decode: Key = ("decode", row["n_gen"], row["n_depth"])
            key: Key = ("prefill", row["n_prompt"], 0) if is_prefill else decode
            speeds[key] = float(row["avg_ts"])
    ready = []
    if arguments.llama_server is not None:
        ready = [server_ready_seconds(arguments, threads) for _ in range(2)]
    return Measured(speeds, ready, peak, about)


def joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def read_rows(output: str) -> list[dict[str, Any]]:
    """The rows that llama-bench printed. Raises PeerError when it printed something else."""
    try:
        rows = json.loads(output)
        for row in rows:
            row["n_prompt"], row["n_gen"], row["n_depth"], row["avg_ts"]
    except (ValueError, TypeError, KeyError):
        raise PeerError(f"llama-bench printed no rows that can be read: {output[:200]!r}") from None
    return list(rows)


def server_ready_seconds(arguments: argparse.Namespace, threads: int) -> float:
    """From the start of llama-server to the answer to a request for one token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(arguments.llama_server),
        *("-m", str(arguments.gguf), "-t", str(threads), "--host", "127.0.0.1", "--port", str(port)),
        *arguments.server_arguments,
    ]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log, started(command, log) as process:
        while True:
            if process.poll() is not None:
                raise PeerError(f"llama-server ended with {process.returncode}: {tail(log)}")
            if time.perf_counter() - start > arguments.timeout:
                raise PeerError(f"llama-server was not ready after {arguments.timeout:g} s")
            if first_token_came(f"http://127.0.0.1:{port}"):
                return time.perf_counter() - start
            time.sleep(0.02)


def first_token_came(address: str) -> bool:
    """Ask the server for one token; False while it does not listen or is still loading (503)."""
    body = json.dumps({"prompt": [1000], "n_predict": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise PeerError(f"llama-server answered {error.code}: {error.read()[:200]!r}") from None
        return False
    except (OSError, urllib.error.URLError):
        return False
    return True


@contextmanager
def started(command: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run_program(command: Sequence[str], name: str, timeout: float) -> tuple[str, int]:
    """(what it printed, its peak resident bytes). Raises PeerError when it fails or takes too long."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        except OSError as error:
            raise PeerError(f"{name} cannot be started: {error}") from None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            # wait4 and not Popen.wait: it tells the peak memory of this child alone.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
        process.returncode = code = os.waitstatus_to_exitcode(status)
        if late.is_set():
            raise PeerError(f"{name} took longer than {timeout:g} s")
        if code != 0:
            raise PeerError(f"{name} ended with {code}: {tail(errors)}")
        output.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return output.read().decode(errors="replace"), usage.ru_maxrss * unit


def tail(log: Any) -> str:
    """The last lines of a log."""
    log.seek(0)
    return " / ".join(log.read().decode(errors="replace").splitlines()[-5:]) or "it printed nothing"
