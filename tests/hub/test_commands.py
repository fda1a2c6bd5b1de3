"""Names where a folder is expected: in every command, from caches and from a hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

import harmonium
from harmonium import cli, loading
from harmonium.hub import HubSettings, pull
from tests.hub.conftest import MIRROR, NAME, REPO
from tests.hub.fake_hub import COMMIT, FakeHub

_PACKAGE_PARENT = str(Path(harmonium.__file__).parent.parent)


def test_pull_prints_the_folder_alone(
    hub: FakeHub, settings: HubSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pull", "20b"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(settings.huggingface_cache / "models--openai--gpt-oss-20b/snapshots" / COMMIT)
    assert "downloading openai/gpt-oss-20b on Hugging Face: 1.1 MB" in err


def test_pull_by_the_mirror_into_a_folder(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pull", "20b", "--source", "modelscope", "--dir", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x")
    assert any("openai-mirror" in seen.target for seen in hub.seen)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pull", "x"], "'x' names no model; expected such as openai/gpt-oss-20b"),
        (["pull", "20b", "--source", "github"], "--source is 'github'; expected huggingface or modelscope"),
        (["pull", "openai/gpt-oss-21b"], "no model 'openai/gpt-oss-21b' on Hugging Face"),
        (["chat", "openai/gpt-oss-21b", "hi"], "no model 'openai/gpt-oss-21b' on Hugging Face"),
        (["inspect", "someone/small-llama"], "is a model of type 'llama'"),
    ],
)
def test_mistakes_cost_a_line(
    hub: FakeHub, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and expected in err and err.count("\n") == 1


def test_inspect_by_name_fetches_headers_alone(
    hub: FakeHub, settings: HubSettings, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", REPO, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["path"] == "openai/gpt-oss-20b on Hugging Face, not here yet: 1.1 MB to download"
    assert report["model"]["experts"] == "mxfp4" and report["fits"]
    speed = report["speed"]
    limit = speed["read_bytes_per_second"] / speed["bytes_per_token"]
    assert speed["decode_tokens_per_second_at_most"] == pytest.approx(limit) and limit > 0
    assert hub.sent < 100_000
    assert not settings.huggingface_cache.exists()
    folder = pull(NAME, settings, tell=lambda text: None)
    assert cli.main(["inspect", REPO, "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert here["model"]["path"] == str(folder)
    assert here["memory"]["expert_bytes"] == report["memory"]["expert_bytes"]
    assert here["model"]["parameters"] == report["model"]["parameters"]


def test_a_name_in_a_cache_is_used_where_it_lies_without_a_network(
    hub: FakeHub, settings: HubSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull(MIRROR, settings, tell=lambda text: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.seen)
    assert loading.find_model("20b") == folder
    assert len(hub.seen) == before


def test_a_folder_of_the_same_name_wins(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "gpt-oss-20b").mkdir(parents=True)
    assert loading.find_model(REPO) == Path(REPO)
    assert not hub.seen


def _heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# Not -m: the source tree in the working folder would stand before the package that is installed.
_RUN = (
    "import sys; sys.path[:] = filter(None, sys.path); from harmonium.__main__ import main; sys.exit(main())"
)


def _start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
        env={**os.environ, "PYTHONPATH": _PACKAGE_PARENT, "no_proxy": "127.0.0.1,localhost"},
    )


def test_serve_straight_from_a_name(hub: FakeHub, tmp_path: Path) -> None:
    process = _start("serve", "20b", "--port", "0", "--no-grammar", "--context-length", "64")
    assert process.stderr is not None and process.stdout is not None
    lines: list[str] = []
    port, ready = threading.Event(), threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "listening on" in line:
                port.set()
            if "ready:" in line:
                ready.set()
        port.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert port.wait(60) and ready.wait(60), lines
        address = next(line.split("listening on ")[1].strip() for line in lines if "listening on" in line)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{address}/v1/models", timeout=20) as answer:
            listed = json.load(answer)
        assert "openai/gpt-oss-20b" in [model["id"] for model in listed["data"]]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        reader.join()
        process.stdout.close()
        process.stderr.close()
    assert any("downloading openai/gpt-oss-20b" in line for line in lines)


def test_ctrl_c_says_that_the_rest_can_follow(hub: FakeHub, settings: HubSettings, models: Path) -> None:
    total = sum(file.stat().st_size for file in (models / REPO).glob("*.safetensors"))
    hub.faults.cut_after = total // 2  # then it waits to try again
    process = _start("pull", "20b")
    deadline = time.monotonic() + 60
    while hub.sent < total // 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "the same command goes on from there" in err
    assert "Traceback" not in err
    hub.faults.cut_after = None
    assert (pull(NAME, settings, tell=lambda text: None) / "config.json").is_file()
