"""Programs that compare.py runs: started, stopped when they take too long, their memory measured."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harmonium.errors import HarmoniumError


class PeerError(HarmoniumError):
    """The other program failed, or said what cannot be read."""


def run_program(
    command: Sequence[str], name: str, timeout: float, folder: Path | None = None
) -> tuple[str, str, int]:
    """(standard output, standard error, peak resident bytes). Raises PeerError when it fails or is late.

    folder: where it runs; None: in an empty one, since some of the peers write a log where they are started.
    """
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryDirectory() as empty,
    ):
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, cwd=folder or empty
            )
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
        errors.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        said, log = (stream.read().decode(errors="replace") for stream in (output, errors))
        return said, log, usage.ru_maxrss * unit


def peak_bytes_of(pid: int) -> int:
    """The most memory that a running process has had, 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def tail(log: Any) -> str:
    """The last lines of a log."""
    log.seek(0)
    return " / ".join(log.read().decode(errors="replace").splitlines()[-5:]) or "it printed nothing"
