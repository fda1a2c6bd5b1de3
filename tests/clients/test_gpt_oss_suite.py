"""The compatibility test of openai/gpt-oss as it is, against `harmonium serve` with a script for its cases.

`tests/clients/install FOLDER gpt-oss` fetches it; without it the tests are skipped. Its streamed run is made
for Chat Completions alone: with Responses it reads `providerData` of a streamed answer, which the release of
@openai/agents that its lock file names leaves out, so that no server can pass. test_tool_arguments.py covers
that combination with the Python SDK.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.installed import client_folder
from tests.clients.scripts import call
from tests.clients.serving import serve_script

pytestmark = pytest.mark.slow

DONE = (
    "<|channel|>analysis<|message|>Now I know.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
)


@pytest.fixture
def suite() -> Path:
    folder = client_folder("gpt-oss") / "compatibility-test"
    if shutil.which("npx") is None:
        pytest.skip("node is not installed")
    assert (folder / "cases.jsonl").is_file()
    return folder


def script_lines(suite: Path, num_apis: int) -> list[dict[str, Any]]:
    """For each case and API: the call that the case expects, then an answer."""
    cases = [json.loads(line) for line in (suite / "cases.jsonl").read_text().splitlines() if line.strip()]
    assert len(cases) >= 30
    lines = []
    for case in cases * num_apis:
        written = call(case["tool_name"], json.loads(case["expected_arguments"]))
        lines += [{"harmony": text, "match": case["input"]} for text in (written, DONE)]
    return lines


@pytest.mark.parametrize(
    ("apis", "options"), [(["responses", "chat"], []), (["chat"], ["--streaming"])], ids=["whole", "streamed"]
)
def test_every_case_passes(suite: Path, tmp_path: Path, apis: list[str], options: list[str]) -> None:
    with serve_script(tmp_path, script_lines(suite, len(apis))) as address:
        provider = {"apiBaseUrl": f"{address}/v1", "apiKey": "x", "apiType": apis, "modelName": "gpt-oss-20b"}
        (suite / "providers.ts").write_text(f"export const PROVIDERS = {json.dumps({'us': provider})};\n")
        done = subprocess.run(
            ["npx", "tsx", "index.ts", "--provider", "us", "--strict", *options],
            cwd=suite,
            env={**os.environ, "NODE_NO_WARNINGS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    runs = 30 * len(apis)
    assert re.search(rf"Total runs: {runs}\b", said), said[-3000:]
    assert re.search(r"pass@k \(k=1\): 1\.000", said), said[-3000:]
    assert f"Invalid Chat Completions API responses: 0 (out of {30})" in said
    assert "Wrong-input tool calls: 0" in said
