"""`harmonium eval` against our own server over a scripted model: judged, counted, resumed, reported."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harmonium.cli import main
from harmonium.engine import EngineInfo, Script, ScriptedEngine
from harmonium.engine.protocol import Request
from harmonium.script_file import last_user_text
from harmonium.server import ServerConfig, ServerState
from tests.evals.rude_server import refused, rude_server, said
from tests.scripted_chat import gen
from tests.server.live import served

QUESTIONS = [f"What is {a} plus {a}?" for a in range(1, 9)]


def reasoned(answer: str, thought: str = "2 + 2 is 100") -> str:
    return (
        f"<|channel|>analysis<|message|>{thought}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight questions in GSM8K's form."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"question": text, "answer": f"so\n#### {2 * n}"} for n, text in enumerate(QUESTIONS, start=1)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def number_of(request: Request) -> int:
    found = re.search(r"What is (\d+) plus", last_user_text(request.token_ids))
    assert found is not None
    return int(found[1])


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run the command against a model that answers the n-th question by this function; gives the report."""

    def run(
        answer: Callable[[int], str | Script],
        *words: str,
        code: int = 0,
        server: ServerConfig | None = None,
        **config: Any,
    ) -> dict[str, Any]:
        def script(request: Request) -> Script:
            made = answer(number_of(request))
            return made if isinstance(made, Script) else Script(gen(made))

        info = EngineInfo("scripted-20b", 131_072, 201_088, engine="scripted")
        engine = ScriptedEngine(script, info=info, **config)
        with served(ServerState(server or ServerConfig(), engine)) as url:
            out = tmp_path / "out"
            command = ["eval", "gsm8k", "--base-url", url, "--data", str(data), "--out", str(out), *words]
            assert main(command) == code
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        return report

    yield run


def samples(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]


def right(n: int) -> str:
    return reasoned(rf"It is \boxed{{{2 * n}}}.")


def test_right_answers_are_counted(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = run(lambda n: right(n) if n % 4 else reasoned(rf"\boxed{{{n}}}"), "--effort", "low")
    (low,) = report["efforts"]
    assert (low["effort"], low["samples"], low["right"], low["errors"]) == ("low", 8, 6, 0)
    assert low["accuracy"]["value"] == 0.75
    assert low["accuracy"]["low"] < 0.75 < low["accuracy"]["high"]
    assert low["reasoning_tokens"] > 0 and low["answer_tokens"] > 0
    assert low["completion_tokens"] == low["reasoning_tokens"] + low["answer_tokens"]
    assert {s["result"] for s in samples(tmp_path)} == {"right", "wrong"}


def test_reasoning_is_never_judged(run: Callable[..., dict[str, Any]]) -> None:
    """The right answer stands in the reasoning alone; B88."""
    report = run(
        lambda n: reasoned("I would rather not say.", rf"\boxed{{{2 * n}}} #### {2 * n}"), "--effort", "low"
    )
    assert report["efforts"][0]["right"] == 0


def test_empty_and_cut_answers_are_wrong_and_counted(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def answer(n: int) -> str | Script:
        if n == 1:
            return reasoned(" ")
        if n == 2:  # the right number is there, and then it goes on until it is cut off
            return Script(gen(rf"<|channel|>final<|message|>\boxed{{{2 * n}}} and more"), end="length")
        return right(n)

    (low,) = run(answer, "--effort", "low")["efforts"]
    assert (low["samples"], low["right"], low["empty"], low["truncated"]) == (8, 6, 1, 1)
    notes = {s["id"]: s["note"] for s in samples(tmp_path)}
    assert (notes["gsm8k-0001"], notes["gsm8k-0002"]) == ("empty answer", "cut off at the longest answer")


MALFORMED = (
    "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final",
    "<|channel|><|channel|>final<|message|>two headers<|return|>",
    "<|channel|>commentary to=functions.x to=functions.y<|message|>{}<|call|>",
    "no header at all<|return|>",
    "<|channel|>analysis<|message|>only this<|return|>",
    "<|start|>assistant<|start|>assistant<|channel|>final<|message|>\ufffd<|end|><|return|>",
)


def test_malformed_streams_fail_no_request(run: Callable[..., dict[str, Any]]) -> None:
    """B88: many at once, some of them broken in the ways that users of other servers reported."""
    words = ("--samples", "8", "--effort", "low,high", "--concurrency", "64")
    report = run(lambda n: right(n) if n % 4 else MALFORMED[n % len(MALFORMED)], *words)
    whole = report["efforts"][-1]
    assert (whole["samples"], whole["errors"], whole["right"]) == (128, 0, 96)


@pytest.mark.parametrize("text", MALFORMED)
def test_each_malformed_stream_is_judged(run: Callable[..., dict[str, Any]], text: str) -> None:
    (low,) = run(lambda n: text, "--effort", "low")["efforts"]
    assert (low["samples"], low["errors"], low["right"]) == (8, 0, 0)


def test_efforts_samples_and_limit_multiply(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = run(right, "--limit", "3", "--samples", "2", "--effort", "high,low", "--concurrency", "3")
    assert [(e["effort"], e["items"], e["samples"]) for e in report["efforts"]] == [
        ("low", 3, 6),
        ("high", 3, 6),
        ("all", 3, 12),
    ]
    assert len({(s["id"], s["effort"], s["number"]) for s in samples(tmp_path)}) == 12


def test_full_server_is_waited_for(run: Callable[..., dict[str, Any]]) -> None:
    """One answer at a time, no queue: the others get 429 and come again."""
    # The server's limit: a slot is taken before anything else; the scripted engine's is looked at twice.
    full = ServerConfig(max_concurrency=1, max_queue=0)
    (low,) = run(right, "--effort", "low", "--concurrency", "2", server=full)["efforts"]
    assert (low["right"], low["errors"]) == (8, 0)


def test_error_of_one_item_stops_nothing(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(n: int) -> str | Script:
        return Script((), error="the engine failed on this") if n == 5 else right(n)

    (low,) = run(answer, "--effort", "low", code=1)["efforts"]
    assert (low["samples"], low["right"], low["errors"]) == (7, 7, 1)
    assert "1 samples ended in an error" in capsys.readouterr().err
    # --resume asks that one again, and it alone.
    asked: list[int] = []
    (low,) = run(lambda n: (asked.append(n), right(n))[1], "--effort", "low", "--resume")["efforts"]
    assert asked == [5]
    assert (low["samples"], low["right"], low["errors"]) == (8, 8, 0)


def test_run_is_not_overwritten(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(right, "--effort", "low", "--limit", "2")
    before = (tmp_path / "out/samples.jsonl").read_text()
    run(right, "--effort", "low", "--limit", "2", code=2)
    assert "holds a run already: --resume" in capsys.readouterr().err
    assert (tmp_path / "out/samples.jsonl").read_text() == before


def test_other_settings_are_named(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(right, "--effort", "low", "--limit", "2")
    run(right, "--effort", "low", "--limit", "3", "--temperature", "0", "--resume", code=2)
    told = capsys.readouterr().err
    assert "limit was 2 and is 3" in told and "temperature was 1.0 and is 0.0" in told
    assert "seed" not in told


def test_resumed_run_asks_only_what_is_left(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    words = ("--effort", "low", "--concurrency", "1")
    run(right, *words)
    path = tmp_path / "out/samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed while the fourth was being written
    asked: list[int] = []
    (low,) = run(lambda n: (asked.append(n), right(n))[1], *words, "--resume")["efforts"]
    assert asked == [4, 5, 6, 7, 8]
    assert (low["samples"], low["right"]) == (8, 8)
    assert len(samples(tmp_path)) == 8


@pytest.mark.slow
def test_killed_run_goes_on(data: Path, tmp_path: Path) -> None:
    """kill -9 while answers are on their way: what was answered is not asked again."""
    script = tmp_path / "script.jsonl"
    line = {"harmony": right(1), "repeat": True, "delay_seconds": 0.02}
    script.write_text(json.dumps(line) + "\n")
    serve = [sys.executable, "-m", "harmonium", "serve", "--engine", f"script:{script}", "--port", "0"]
    out = tmp_path / "out"
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(found[0] for text in server.stderr if (found := re.search(r"http://[\d.:]+", text)))
            command = [
                sys.executable,
                "-m",
                "harmonium",
                "eval",
                "gsm8k",
                "--base-url",
                url,
                "--data",
                str(data),
            ]
            command += ["--out", str(out), "--effort", "low", "--concurrency", "2"]
            with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as first:
                path = out / "samples.jsonl"
                end = time.monotonic() + 60
                while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
                    assert time.monotonic() < end and first.poll() is None
                    time.sleep(0.01)
                os.kill(first.pid, signal.SIGKILL)
            kept = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
            done = subprocess.run(
                [*command, "--resume", "--json"], capture_output=True, text=True, check=False
            )
        finally:
            server.terminate()
            server.wait(20)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(kept)
    assert len(samples(tmp_path)) == 8
    assert json.loads(done.stdout)["efforts"][0]["samples"] == 8


def test_two_runs_do_not_write_one_folder(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    run(right, "--effort", "low")
    with (tmp_path / "out/samples.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        run(right, "--effort", "low", "--resume", code=2)
    assert "is being written by another run" in capsys.readouterr().err


def test_same_seed_asks_the_same(data: Path, tmp_path: Path) -> None:
    bodies = []
    for name in ("a", "b"):
        with rude_server(said(r"\boxed{2}")) as server:
            command = [
                "eval",
                "gsm8k",
                "--base-url",
                server.url,
                "--data",
                str(data),
                "--out",
                str(tmp_path / name),
            ]
            assert (
                main([*command, "--limit", "4", "--samples", "2", "--effort", "high", "--concurrency", "1"])
                == 0
            )
        bodies.append(server.bodies)
    assert bodies[0] == bodies[1]
    assert len({body["seed"] for body in bodies[0]}) == 8
    first = bodies[0][0]
    assert (first["model"], first["reasoning_effort"], first["temperature"]) == ("rude", "high", 1.0)
    assert first["max_tokens"] >= 64_000


def test_server_that_is_gone_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harmonium.evals.client.MAX_BROKEN", 1)
    monkeypatch.setattr("harmonium.evals.run.MAX_LOST_IN_A_ROW", 3)
    from harmonium.evals.client import ChatClient

    monkeypatch.setattr(ChatClient, "model_names", lambda self: ["gone"])
    command = [
        "eval",
        "gsm8k",
        "--base-url",
        "http://127.0.0.1:9",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--effort", "low", "--concurrency", "1"]) == 1
    assert len(samples(tmp_path)) == 3
    assert (tmp_path / "out/report.html").is_file()


def test_report_page_holds_no_markup_of_others(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(
        lambda n: reasoned("<script>alert(1)</script> & <img src=x onerror=y>", "</pre><b>"),
        "--effort",
        "low",
    )
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page and "&lt;/pre&gt;&lt;b&gt;" in page
    assert "<script" not in page and "<img" not in page
    assert not re.search(
        r"(?:src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)",
        re.sub(r"<pre>.*?</pre>", "", page, flags=re.S),
    )


def test_result_is_printed(run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    run(right, "--effort", "low,high")
    told = capsys.readouterr()
    assert "100.0 %" in told.out and "scripted-20b" in told.out and "Wilson" in told.out
    assert "report.html" in told.err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["eval"], "which task"),
        (["eval", "gsm9k"], "did you mean gsm8k"),
        (["eval", "gsm8k", "--effort", "lo"], "no effort"),
        (["eval", "gsm8k", "--limit", "0"], "--limit"),
        (["eval", "gsm8k", "--temperature", "nan"], "--temperature"),
        (["eval", "gsm8k", "--model", "a", "--base-url", "b", "--data", "."], "expected one"),
        (["eval", "gsm8k", "--data", "/nowhere"], "no folder"),
        (["eval", "demo", "--data", "."], "no use here"),
        (["eval", "gsm8k", "--base-ulr", "x"], "did you mean --base-url"),
    ],
)
def test_mistakes_cost_a_line(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert why in told and told.count("\n") == 1


def test_unreachable_server_costs_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "eval",
        "gsm8k",
        "--base-url",
        "http://127.0.0.1:9",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(command) == 2
    assert "nobody answers at http://127.0.0.1:9/v1" in capsys.readouterr().err


def test_model_that_the_server_lacks_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rude_server(refused(404), models=("a", "b")) as server:
        command = [
            "eval",
            "gsm8k",
            "--base-url",
            server.url,
            "--data",
            str(data),
            "--out",
            str(tmp_path / "o"),
        ]
        assert main(command) == 2
        assert main([*command, "--model-name", "c"]) == 2
    told = capsys.readouterr().err
    assert "has a, b: --model-name" in told and "no model 'c'" in told


def test_server_that_still_loads_is_waited_for(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harmonium.evals.client import ChatClient

    listed = iter([[], [], ["rude"]])
    monkeypatch.setattr(ChatClient, "model_names", lambda self: next(listed))
    with rude_server(said("x")) as server:
        command = [
            "eval",
            "gsm8k",
            "--base-url",
            server.url,
            "--data",
            str(data),
            "--out",
            str(tmp_path / "o"),
        ]
        assert main([*command, "--limit", "1", "--effort", "low"]) == 0


def test_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    told = capsys.readouterr().out
    for name in ("mmlu", "gpqa", "aime24", "aime25", "ifeval", "gsm8k", "humaneval", "demo"):
        assert re.search(rf"^{name}\s", told, re.MULTILINE)
