"""Where the clients are that tests/clients/install put outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def client_folder(name: str) -> Path:
    """The folder of this client. Skips the test, with the reason, where it was not installed."""
    root = os.environ.get("HARMONIUM_CLIENTS")
    if not root:
        pytest.skip("HARMONIUM_CLIENTS is not set: tests/clients/install FOLDER makes such a folder")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: tests/clients/install {root} {name}")
    return folder


def run_node(script: str, base_url: str, *arguments: str) -> Any:
    """What the script prints as its last line, which must be JSON. Skips without Node or its packages."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    folder = client_folder("node")
    # Node looks for packages from where a script lies, so the script goes beside them.
    source = (HERE / script).read_text(encoding="utf-8")
    done = subprocess.run(
        [node, "--input-type=module", "-", *arguments],
        input=source,
        cwd=folder,
        env={**os.environ, "BASE_URL": f"{base_url}/v1", "NODE_NO_WARNINGS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
