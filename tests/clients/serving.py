"""`harmonium serve --engine script:FILE` as a process of its own, for clients that are programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def serve_script(directory: Path, lines: list[dict[str, Any]], *options: str) -> Iterator[str]:
    """The server's address (without /v1) while it runs. The script is checked by the request's grammar."""
    script = directory / "script.jsonl"
    script.write_text("".join(json.dumps({"grammar": True, **line}) + "\n" for line in lines))
    command = [sys.executable, "-m", "harmonium", "serve", "--engine", f"script:{script}"]
    command += ["--port", "0", "--served-model-name", "gpt-oss-20b", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield _address(process)
        finally:
            process.terminate()
            process.wait(20)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    told = ""
    address = None
    for line in process.stderr:
        told += line
        found = re.search(r"http://[\d.]+:\d+", line)
        address = found[0] if found else address
        if "ready" in line and address is not None:
            return address
    raise AssertionError(f"the server did not start: {told}")
