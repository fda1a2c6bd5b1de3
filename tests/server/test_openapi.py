"""Our OpenAPI document: schemathesis makes requests of it, good and bad, and none may be a 5xx."""

from __future__ import annotations

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
    state = make_state(REASONED)
    with served(state) as url:
        document = tmp_path / "openapi.json"
        document.write_bytes(httpx.get(f"{url}/openapi.json").content)
        options = [
            "--phases",
            "coverage",
            "--checks",
            "not_a_server_error",
            "--max-examples",
            "10",
            "--workers",
            "1",
        ]
        program = [sys.executable, "-m", "schemathesis.cli", "run"]
        command = [*program, str(document), "--url", url, *options]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]
        assert state.num_held == 0
