"""Stored responses through the death of the server's process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

SCRIPT = [
    {"harmony": "<|channel|>final<|message|>one<|return|>", "match": "first"},
    {"harmony": "<|channel|>final<|message|>two<|return|>", "match": "second"},
    {"harmony": "<|channel|>final<|message|>a b c d e f g h<|return|>", "delay_seconds": 5, "match": "slow"},
]


@contextmanager
def _killed(directory: Path) -> Iterator[httpx.Client]:
    """A client of a server that is killed with signal 9 at the end."""
    script = directory / "script.jsonl"
    script.write_text("".join(json.dumps({**line, "repeat": True}) + "\n" for line in SCRIPT))
    command = [sys.executable, "-m", "harmonium", "serve", "--engine", f"script:{script}", "--port", "0"]
    command += ["--store", str(directory / "responses.db")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            told = ""
            while "ready" not in told:
                line = process.stderr.readline()
                assert line, told
                told += line
            address = re.search(r"http://[\d.]+:\d+", told)
            assert address is not None, told
            with httpx.Client(base_url=address[0], timeout=30) as client:
                yield client
        finally:
            process.kill()


def test_killed_server_loses_no_completed_response_and_ends_the_others(tmp_path: Path) -> None:
    with _killed(tmp_path) as client:
        first = client.post("/v1/responses", json={"input": "first"}).json()
        assert first["status"] == "completed"
        slow = client.post("/v1/responses", json={"input": "slow", "background": True}).json()
        assert slow["status"] == "queued"
    with _killed(tmp_path) as client:
        assert client.get(f"/v1/responses/{first['id']}").json() == first
        lost = client.get(f"/v1/responses/{slow['id']}").json()
        assert (lost["status"], lost["error"]["code"]) == ("failed", "server_error")
        fields = {"input": "second", "previous_response_id": first["id"]}
        assert client.post("/v1/responses", json=fields).json()["status"] == "completed"
        shown = client.post("/v1/responses/render", json=fields).json()["text"]
        assert "first<|end|><|start|>assistant<|channel|>final<|message|>one<|end|>" in shown
