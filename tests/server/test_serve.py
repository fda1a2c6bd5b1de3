"""`harmonium serve` as a process: loading, draining, signals, the port."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import harmonium
from harmonium.options import engine_config, parse
from harmonium.server.serve import listen, server_config
from tests.server.client import HELLO, error_of
from tests.server.live import wait_until

SLOW = {
    "harmony": f"<|channel|>final<|message|>{'word ' * 30}<|return|>",
    "delay_seconds": 0.05,
    "match": "slow",
}
ENDLESS = {**SLOW, "harmony": "<|channel|>final<|message|>" + "word " * 5000, "match": "endless"}
QUICK = {"harmony": "<|channel|>final<|message|>hi<|return|>", "repeat": True}


class Process:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str, script: tuple[Any, ...] = (SLOW, ENDLESS, QUICK)) -> None:
        path = folder / "answers.jsonl"
        path.write_text("\n".join(map(json.dumps, script)), encoding="utf-8")
        parent = str(Path(harmonium.__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": parent}
        command = [
            sys.executable,
            "-m",
            "harmonium.cli",
            "serve",
            "--engine",
            f"script:{path}",
            "--port",
            "0",
        ]
        self.lines: list[str] = []
        self.child = subprocess.Popen(
            [*command, *options],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self._find(r"ready: ") is not None or self.child.poll() is not None, 20)
        found = self._find(r"listening on (http://\S+:\d+)")
        assert found is not None, self.lines
        self.url = found[1]

    def _read(self) -> None:
        assert self.child.stderr is not None
        self.lines.extend(self.child.stderr)

    def _find(self, pattern: str) -> re.Match[str] | None:
        return next((match for line in list(self.lines) if (match := re.search(pattern, line))), None)

    def post(self, text: str = "hi", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=20)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        self._reader.join()
        assert self.child.stderr is not None
        self.child.stderr.close()


@contextmanager
def process(folder: Path, *options: str) -> Iterator[Process]:
    server = Process(folder, *options)
    try:
        yield server
    finally:
        server.close()


def streamed(server: Process, text: str) -> tuple[threading.Thread, list[str]]:
    """A stream read in a thread; its events."""
    events: list[str] = []

    def read() -> None:
        body = {"messages": [{"role": "user", "content": text}], "stream": True}
        try:
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=20) as response:
                for line in filter(None, response.iter_lines()):
                    events.append(line)  # noqa: PERF402  # each is seen as it comes
        except httpx.HTTPError as error:
            events.append(repr(error))

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: len(events) > 2)
    return thread, events


def test_first_sigterm_lets_running_answers_end_and_refuses_new_ones(tmp_path: Path) -> None:
    with process(tmp_path, "--log-format", "json") as server:
        assert server.post().json()["choices"][0]["message"]["content"] == "hi"
        thread, events = streamed(server, "slow")
        server.child.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.url}/health").json()["status"] == "draining")
        refused = server.post()
        assert error_of(refused, 503)["code"] == "server_draining"
        assert refused.headers["retry-after"] == "5"
        thread.join(20)
        assert events[-1] == "data: [DONE]"
        assert server.child.wait(10) == 0
        server._reader.join()
        assert all("logger" in json.loads(line) for line in server.lines)


def test_second_sigterm_ends_the_process_at_once(tmp_path: Path) -> None:
    with process(tmp_path, "--drain-timeout", "600") as server:
        thread, _ = streamed(server, "endless")
        server.child.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.url}/health").json()["status"] == "draining")
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(60) == 128 + signal.SIGTERM  # not after the drain
        thread.join(20)


def test_answers_that_outlast_the_drain_end_with_an_error_event(tmp_path: Path) -> None:
    with process(tmp_path, "--drain-timeout", "0.2") as server:
        thread, events = streamed(server, "endless")
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(10) == 0
        thread.join(20)
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "server_draining"


def test_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    from harmonium.cli import main

    with listen("127.0.0.1", 0) as taken:
        script = tmp_path / "s.jsonl"
        script.write_text(json.dumps(QUICK), encoding="utf-8")
        port = taken.getsockname()[1]
        assert main(["serve", "--engine", f"script:{script}", "--port", str(port)]) == 2


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMONIUM_API_KEY", "k1, k2")
    words = (
        "serve tiny --served-model-name a b --max-model-len 4096 --max-num-seqs 3 --max-queue 7 --effort low "
        "--date 2026-01-02 --cors https://x.org --reasoning-field reasoning --limit tools=9 --host 0.0.0.0 "
        "--trust_remote_code --dtype auto --enable-auto-tool-choice --tool-call-parser openai -tp 1"
    )
    arguments = parse(words.split())
    config = server_config(arguments)
    assert config.model_names == ("a", "b")
    assert config.api_keys == ("k1", "k2")
    assert (config.max_concurrency, config.max_queue, config.effort) == (3, 7, "low")
    assert (config.current_date, config.cors_origins) == ("2026-01-02", ("https://x.org",))
    assert (config.reasoning_fields, config.limits.tools) == (("reasoning",), 9)
    assert config.uses_grammar
    assert len(arguments.told) == 3
    arguments.max_sequences = arguments.max_concurrency
    assert engine_config(arguments).context_length == 4096
    assert engine_config(arguments).max_queue == 7
    assert HELLO
