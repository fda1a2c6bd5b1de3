"""Servers in processes of their own over one database: started at once, one of them killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

import harmonium

SCRIPT = [
    {"harmony": "<|channel|>final<|message|>one<|return|>", "match": "first"},
    {"harmony": "<|channel|>final<|message|>two<|return|>", "match": "second"},
    {"harmony": "<|channel|>final<|message|>a b c d e f g h<|return|>", "delay_seconds": 60, "match": "slow"},
]


class Child:
    """A server that listens, or will."""

    def __init__(self, folder: Path, environment: dict[str, str], *options: str) -> None:
        self._told = ""
        script = folder / "script.jsonl"
        script.write_text("".join(json.dumps({**line, "repeat": True}) + "\n" for line in SCRIPT))
        command = [
            sys.executable,
            "-m",
            "harmonium.cli",
            "serve",
            "--engine",
            f"script:{script}",
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=folder,  # not the source tree, which an installed package must not need
            env={**os.environ, "PYTHONPATH": str(Path(harmonium.__file__).parent.parent), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def client(self) -> httpx.Client:
        """When the server is ready."""
        assert self.process.stderr is not None
        while "ready" not in self._told:
            line = self.process.stderr.readline()
            assert line, self._told
            self._told += line
        address = re.search(r"http://[\d.]+:\d+", self._told)
        assert address is not None, self._told
        return httpx.Client(base_url=address[0], timeout=60)

    def kill(self) -> str:
        """With signal 9. Returns all that it said. A second call does nothing more."""
        self.process.kill()
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            self._told += self.process.stderr.read()
            self.process.stderr.close()
        self.process.wait()
        return self._told


@contextmanager
def children(folder: Path, url: str) -> Iterator[list[Child]]:
    with ExitStack() as stack:
        found = [Child(folder, {"HARMONIUM_STORE_URL": url}) for _ in range(2)]
        for child in found:
            stack.callback(child.kill)
        yield found


def _forget(url: str) -> None:
    """As if a minute had gone by since a server told of what runs."""
    from sqlalchemy import create_engine

    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE harmonium_responses SET seen = seen - 60")
    engine.dispose()


def test_servers_share_responses_and_one_that_is_killed_leaves_none_running(
    shared_url: str, tmp_path: Path
) -> None:
    with children(tmp_path, shared_url) as (one, two), one.client() as first, two.client() as second:
        made = first.post("/v1/responses", json={"input": "first"}).json()
        slow = first.post("/v1/responses", json={"input": "slow", "background": True}).json()
        end = time.monotonic() + 60
        while second.get(f"/v1/responses/{slow['id']}").json()["status"] != "in_progress":
            assert time.monotonic() < end
            time.sleep(0.2)
        one.kill()
        _forget(shared_url)
        lost = second.get(f"/v1/responses/{slow['id']}").json()
        assert (lost["status"], lost["error"]["code"]) == ("failed", "server_error")
        fields = {"input": "second", "previous_response_id": made["id"]}
        assert second.post("/v1/responses", json=fields).json()["status"] == "completed"
        shown = second.post("/v1/responses/render", json=fields).json()["text"]
        assert "first<|end|><|start|>assistant<|channel|>final<|message|>one<|end|>" in shown


def test_password_is_shown_nowhere(empty_postgres_url: str, tmp_path: Path) -> None:
    url = empty_postgres_url.replace("harmonium@", "harmonium:never-shown@")
    with children(tmp_path, url) as (one, two), one.client() as first:
        pages = [
            first.get(path).text for path in ("/health", "/ready", "/metrics", "/v1/models", "/openapi.json")
        ]
        assert "never-shown" not in "".join(pages)
        assert "never-shown" not in one.kill()
        assert b"never-shown" not in Path(f"/proc/{two.process.pid}/cmdline").read_bytes()


@pytest.mark.parametrize("from_environment", [False, True])
def test_database_that_cannot_be_reached_is_one_line(tmp_path: Path, from_environment: bool) -> None:
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("psycopg")
    url = "postgresql://me:never-shown@127.0.0.1:1/x"
    if from_environment:
        child = Child(tmp_path, {"HARMONIUM_STORE_URL": url})
    else:
        child = Child(tmp_path, {}, "--store-url", url)
    assert child.process.wait(60) == 2
    *remarks, last = child.kill().splitlines()
    assert last.startswith("harmonium: store postgresql+psycopg://me:***@127.0.0.1:1/x cannot be used: ")
    seen = (
        "harmonium: the password in --store-url is seen by whoever may call ps; HARMONIUM_STORE_URL hides it"
    )
    assert remarks == ([] if from_environment else [seen])
    assert "never-shown" not in last
