"""Running code that a model wrote: no network, no written file, no other process, bounded time and memory.

The code runs in a Python process of its own that gives up those rights before it begins: a seccomp filter
(seccomp.py) that no user needs privileges for and that holds in containers too, and resource limits. It may
read what this user may read, and what it reads goes nowhere. Where the filter cannot be had (another system
than Linux, another machine, a kernel without it), code is not run at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from harmonium.errors import ConfigError
from harmonium.evals.seccomp import filter_program

MEMORY_BYTES = 1 << 30
MAX_RESULT_BYTES = 1 << 16
START_SECONDS = 20.0
"""Allowed for the interpreter's own start on a busy machine, besides the code's time."""

_PROBE = """
import os, socket, threading
allowed = []
def refused(name, call):
    try:
        call()
    except (OSError, RuntimeError):
        return
    allowed.append(name)
refused("the network", lambda: socket.socket())
refused("writing files", lambda: open(os.devnull, "w"))
refused("new processes", os.fork)
refused("signals", lambda: os.kill(os.getppid(), 0))
refused("threads", lambda: threading.Thread(target=int).start())
assert not allowed, allowed
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """passed: the code came to its end without an exception. reason: why not, for the report."""

    passed: bool
    reason: str = ""


def check_sandbox() -> None:
    """Raises ConfigError, with the reason, when code cannot be confined here. Tries it, in a process."""
    reason = f"there is no filter for {sys.platform} on this machine"
    if sys.platform == "linux" and filter_program() is not None:
        outcome = run_confined(_PROBE, 10.0)
        if outcome.passed:
            return
        reason = outcome.reason
    raise ConfigError(
        "this task runs code that the model wrote, and here nothing keeps that from the network and from "
        f"your files: {reason}. It needs Linux on x86-64 or aarch64 with seccomp filters"
    )


def run_confined(code: str, seconds: float) -> Outcome:
    """Run the code to its end, at most that many seconds of wall-clock time.

    An exit before the end (sys.exit, os._exit, a crash) is no pass.
    """
    program = filter_program()
    assert program is not None, "check_sandbox comes first"
    child = Path(__file__).with_name("sandbox_child.py")
    command = [sys.executable, "-I", "-S", "-B", str(child), program.hex(), str(int(seconds) + 1)]
    with subprocess.Popen(
        [*command, str(MEMORY_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            return _outcome(process, code, seconds)
        finally:
            _kill(process)


def _outcome(process: subprocess.Popen[bytes], code: str, seconds: float) -> Outcome:
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with contextlib.suppress(BrokenPipeError):  # it could not start; its stderr says why
        process.stdin.write(code.encode("utf-8", "replace"))
        process.stdin.close()
    written = _read(process.stdout.fileno(), seconds + START_SECONDS)
    if written is None:
        return Outcome(False, f"stopped after {seconds:g} s")
    try:
        error = json.loads(written)["error"]
    except (ValueError, KeyError, TypeError):
        _kill(process)
        told = process.stderr.read(2000).decode("utf-8", "replace").strip().splitlines()
        status = process.wait()
        if status == -signal.SIGXCPU or status == -signal.SIGKILL:
            return Outcome(False, f"stopped after {seconds:g} s")
        return Outcome(False, told[-1] if told else f"ended early, with status {status}")
    return Outcome(error is None, str(error or ""))


def _read(descriptor: int, seconds: float) -> bytes | None:
    """All that comes until the other side closes; None when it takes too long. At most MAX_RESULT_BYTES."""
    end = time.monotonic() + seconds
    found = b""
    while len(found) < MAX_RESULT_BYTES:
        left = end - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return None
        piece = os.read(descriptor, MAX_RESULT_BYTES)
        if not piece:
            break
        found += piece
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
