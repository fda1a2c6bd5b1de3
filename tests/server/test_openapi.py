"""Our OpenAPI document: schemathesis makes requests of it, good and bad, and none may be a 5xx.

More of them by hand, with the figures printed:
HARMONIUM_EXAMPLES=300 pytest tests/server/test_openapi.py -m "" -s
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.scripted_chat import REASONED
from tests.server.client import make_state
from tests.server.live import served


@pytest.mark.slow
def test_no_request_of_schemathesis_is_a_5xx(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    count = os.environ.get("HARMONIUM_EXAMPLES")
    phases = "coverage" if count is None else "examples,coverage,fuzzing"
    state = make_state(REASONED)
    with served(state) as url:
        document = tmp_path / "openapi.json"
        document.write_bytes(httpx.get(f"{url}/openapi.json").content)
        options = ["--phases", phases, "--checks", "not_a_server_error", "--max-examples", count or "10"]
        options += ["--workers", "1", "--seed", "1"]
        program = [sys.executable, "-m", "schemathesis.cli", "run"]
        command = [*program, str(document), "--url", url, *options]
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False
        )
        assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]
        assert state.num_held == 0
    print(found.stdout[-1500:])
