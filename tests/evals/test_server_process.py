"""The server of a run: the right words, ready before the first question, gone after the last."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harmonium.cli import main
from harmonium.errors import ConfigError, EngineError
from harmonium.evals.client import Address, ChatClient
from harmonium.evals.server_process import serve_words, served
from harmonium.options import parse
from harmonium.testing import make_tiny_checkpoint


def arguments(*words: str) -> argparse.Namespace:
    return parse(["eval", "gsm8k", *words])


def test_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmonium.evals.server_process._longest_context", lambda model: 131_072)
    given = arguments("--threads", "3", "--weights", "bf16", "--memory-limit", "14GiB")
    given.experts, given.expert_memory = "streamed", 5 << 30
    words = serve_words("PATH", given, 6, 98_304)
    options = parse(words)
    assert (options.command, options.model, options.port) == ("serve", "PATH", 0)
    assert (options.threads, options.weights, options.memory_limit) == (3, "bf16", 14 << 30)
    assert (options.experts, options.expert_memory) == ("streamed", 5 << 30)
    assert options.max_concurrency == 6
    assert options.context_length == 98_304 + 8_192


def test_context_is_the_models_own_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmonium.evals.server_process._longest_context", lambda model: 4_096)
    assert parse(serve_words("PATH", arguments(), 1, 98_304)).context_length == 4_096
    assert parse(serve_words("PATH", arguments("--context-length", "99"), 1, 98_304)).context_length == 99
    assert parse(serve_words(None, arguments(), 1, 98_304)).context_length is None


@pytest.mark.slow
def test_server_runs_for_the_time_of_the_run(tmp_path: Path) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"harmony": "<|channel|>final<|message|>hi<|return|>"}) + "\n")
    with served(["serve", "--engine", f"script:{script}", "--port", "0"]) as url:
        client = ChatClient(Address.parse(url))
        assert client.model_names() == ["scripted"]
        assert client.ask({"messages": [{"role": "user", "content": "hello"}]}).content == "hi"
    with pytest.raises(ConfigError, match="nobody answers"):
        client.model_names()


@pytest.mark.slow
def test_killed_run_leaves_no_server(tmp_path: Path) -> None:
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"harmony": "<|channel|>final<|message|>hi<|return|>"}) + "\n")
    code = (
        "import sys, time\nfrom harmonium.evals.server_process import served\n"
        "with served(sys.argv[1:]) as url:\n    print(url, flush=True)\n    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, "serve", "--engine", f"script:{script}", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        url = run.stdout.readline().strip()
        run.kill()
    client = ChatClient(Address.parse(url))
    end = time.monotonic() + 60
    with pytest.raises(ConfigError, match="nobody answers"):
        while time.monotonic() < end:
            client.model_names()
            time.sleep(0.05)


@pytest.mark.slow
def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    words = ["serve", "--engine", f"script:{tmp_path}/no-such-file", "--port", "0"]
    with pytest.raises(EngineError, match=r"did not start: .*no-such-file"), served(words):
        pytest.fail("it started")
    with pytest.raises(ConfigError, match="nowhere"):
        serve_words(f"{tmp_path}/nowhere", arguments(), 1, 100)


@pytest.mark.slow
def test_evaluation_of_a_checkpoint_from_one_command(tmp_path: Path) -> None:
    """A tiny random model: gibberish, cut off, wrong, and counted as such."""
    model = make_tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 2)
    out = tmp_path / "out"
    words = ["--model", str(model), "--data", str(tmp_path), "--out", str(out), "--max-tokens", "40"]
    words += ["--effort", "low", "--threads", "1", "--concurrency", "2"]
    assert main(["eval", "gsm8k", *words]) == 0
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    (low,) = report["efforts"]
    assert (low["samples"], low["errors"]) == (2, 0)
    assert low["truncated"] + low["right"] <= 2 and low["completion_tokens"] <= 40
    assert (out / "report.html").stat().st_size > 1000
