"""compare.py against stand-ins for the peers' programs: scripts that print what those print."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import harmonium
from harmonium.testing import make_tiny_checkpoint

COMPARE = Path(__file__).parents[2] / "benchmarks" / "compare.py"

FAKE_BENCH = """\
import json, sys
words = [word for word in sys.argv[1:] if word != "--no-warmup"]
given = {}
for name, value in zip(words[::2], words[1::2]):
    given.setdefault(name, []).extend(value.split(",") if name in ("-p", "-n", "-d") else [value])
open(sys.argv[0] + ".log", "a").write(json.dumps(sys.argv[1:]) + "\\n")
rows = []
for prompt in map(int, given["-p"]):
    if prompt:
        rows.append({"n_prompt": prompt, "n_gen": 0, "avg_ts": 0.5 if prompt != 64 else 1e9})
if "-w" in given:  # ik_llama.cpp: no -d; a prompt before is a pair
    for prompt, generated in (map(int, pair.split(",")) for pair in given.get("-gp", [])):
        rows.append({"n_prompt": prompt, "n_gen": generated, "avg_ts": 0.75 + prompt})
else:
    for depth in map(int, given.get("-d", ["0"])):
        for generated in map(int, given["-n"]):
            if generated:
                rows.append({"n_prompt": 0, "n_gen": generated, "n_depth": depth, "avg_ts": 0.25 + depth})
for row in rows:
    row |= {"build_commit": "abc", "build_number": 7}
print(json.dumps(rows))
"""

FAKE_BATCHED = """\
import sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("warming up", file=sys.stderr)
print("|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |", file=sys.stderr)
print("|-------|--------|------|--------|----------|----------|----------|----------|", file=sys.stderr)
for batch in given["-npl"].split(","):
    row = [given["-npp"], given["-ntg"], batch, "80", "0.009", "6.98", "0.02", "0." + batch, ""]
    print("|", " | ".join(row), file=sys.stderr)
"""

FAKE_SERVER = """\
import http.server, json, sys, time
host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
ready = time.monotonic() + 0.3
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.say({"data": [{"id": "some-model"}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if time.monotonic() < ready:
            return self.say({}, status=503)
        if self.path == "/completion":
            time.sleep(0.02 * body["n_predict"])
            return self.say({"content": "a"}, {"tokens_predicted": body["n_predict"]})
        assert self.path == "/v1/completions" and body["model"] == "some-model"
        self.say({"usage": {"completion_tokens": body["max_tokens"] - LESS}})
    def say(self, *answers, status=200):
        self.send_response(status)
        self.end_headers()
        start = "data: " if len(answers) > 1 else ""
        self.wfile.write("\\n\\n".join(start + json.dumps(answer) for answer in answers).encode())
    def log_message(self, *arguments):
        pass
LESS = 0
server = Server((host, int(port)), Answer)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("compare") / "tiny", vocabulary_size=500)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def program(folder: Path, name: str, code: str) -> Path:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return path


def compare(*arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMPARE), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(harmonium.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode == 0) == ok, done.stderr
    return done


@contextmanager
def running_server(folder: Path, code: str) -> Iterator[str]:
    path = program(folder, "running-server", code)
    with subprocess.Popen([path, "--host", "127.0.0.1", "--port", "0"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def test_rounds_alternate_and_ratios_are_ours_over_theirs(tmp_path: Path, tiny: Path, gguf: Path) -> None:
    llama, ik = program(tmp_path, "llama", FAKE_BENCH), program(tmp_path, "ik", FAKE_BENCH)
    server, out = program(tmp_path, "server", FAKE_SERVER), tmp_path / "out.json"
    done = compare(
        *(tiny, "--gguf", gguf, "--llama-bench", llama, "--llama-server", server, "--ik-bench", ik, "--json"),
        *("--rounds", 2, "--prefill", 16, "--decode", 4, "--depth", "0,8", "--threads", 1, "--start"),
        *("--llama-arguments", "-fa off", "--out", out),
    )
    record = json.loads(done.stdout)
    assert json.loads(out.read_text()) == record
    rows = {row["name"]: row for row in record["rows"]}
    names = ["ready", "ready again", "prefill 16", "decode at 0", "decode at 8", "peak resident"]
    assert list(rows) == names
    assert rows["prefill 16"]["sides"]["llama.cpp"]["values"] == [0.5, 0.5]
    depths = [rows[f"decode at {depth}"]["sides"] for depth in (0, 8)]
    assert [sides["llama.cpp"]["median"] for sides in depths] == [0.25, 8.25]
    assert [sides["ik_llama.cpp"]["median"] for sides in depths] == [0.75, 8.75]
    for name in ("prefill 16", "decode at 8"):
        row = rows[name]
        ours, theirs = row["sides"]["ours"]["values"], row["sides"]["llama.cpp"]["values"]
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        assert row["ratios"]["llama.cpp"] == pytest.approx(statistics.median(ratios))
        assert row["limit"] > row["sides"]["ours"]["high"] and 0 < row["share"] < 1
    assert rows["ready"]["sides"]["llama.cpp"]["low"] > 0.3
    assert rows["ready"]["ratios"]["llama.cpp"] == pytest.approx(
        statistics.median(
            theirs / ours
            for ours, theirs in zip(
                *(rows["ready"]["sides"][side]["values"] for side in ("ours", "llama.cpp")), strict=True
            )
        )
    )
    assert record["machine"]["read_bandwidth"] > 1e8
    assert record["sides"]["llama.cpp"]["build_commit"] == "abc"
    steps = [line.rsplit(" (")[0].split(": ")[1:] for line in done.stderr.splitlines()]
    one_round = [[group, side] for group in ("start",) for side in ("ours", "llama.cpp")]
    one_round += [
        [group, side] for group in ("prefill", "depth") for side in ("ours", "ik_llama.cpp", "llama.cpp")
    ]
    assert steps == 2 * one_round


def test_programs_are_called_in_their_own_words(tmp_path: Path, tiny: Path, gguf: Path) -> None:
    llama, ik = program(tmp_path, "llama", FAKE_BENCH), program(tmp_path, "ik", FAKE_BENCH)
    compare(
        *(tiny, "--gguf", gguf, "--llama-bench", llama, "--ik-bench", ik, "--rounds", 1, "--threads", 1),
        *("--prefill", "16,40", "--decode", 4, "--depth", "0,8", "--llama-longest", 20),
    )
    theirs, forks = (
        [json.loads(line) for line in Path(f"{path}.log").read_text().splitlines()] for path in (llama, ik)
    )
    start = ["-m", str(gguf), "-r", "1", "-t", "1", "-o", "json"]
    llama_words = [*start, "-fa", "on", "-lm", "none", "--repack", "1", "--no-warmup"]
    assert theirs == [
        [*llama_words, "-p", "64,16", "-n", "0"],
        [*llama_words, "-p", "0", "-n", "4", "-d", "0,8"],
    ]
    ik_words = [*start, "-fa", "1", "-rtr", "1", "-fmoe", "1", "-mmp", "0", "-thp", "1", "-w", "0"]
    assert forks == [
        [*ik_words, "-p", "64,16,40", "-n", "0"],
        [*ik_words, "-p", "64", "-n", "0", "-gp", "0,4", "-gp", "8,4"],
    ]


def test_sequences_together_and_first_tokens(tmp_path: Path, tiny: Path, gguf: Path) -> None:
    server = program(tmp_path, "server", FAKE_SERVER)
    batched = program(tmp_path, "batched", FAKE_BATCHED)
    done = compare(
        *(tiny, "--gguf", gguf, "--llama-server", server, "--ik-batched-bench", batched, "--rounds", 1),
        *("--prefill", "none", "--depth", "none", "--batch", "2,3", "--batch-depth", 5, "--decode", 4),
        *("--first-token", 40, "--threads", 1, "--json"),
    )
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows)[:4] == ["decode x2 at 5", "decode x3 at 5", "same x2 at 5", "same x3 at 5"]
    assert list(rows)[4:] == ["first token 40", "first token again 40", "restarted 40", "peak resident"]
    # Four tokens take 0.08 s, whatever the batch.
    assert 0 < rows["decode x2 at 5"]["sides"]["llama.cpp"]["median"] <= 2 * 4 / 0.08
    assert 0 < rows["decode x3 at 5"]["sides"]["llama.cpp"]["median"] <= 3 * 4 / 0.08
    assert rows["same x3 at 5"]["sides"]["ik_llama.cpp"]["median"] == 0.3
    assert "ik_llama.cpp" not in rows["decode x2 at 5"]["sides"], "its streams are all the same"
    assert rows["first token 40"]["sides"]["llama.cpp"]["median"] >= 0.02
    assert set(rows["restarted 40"]["sides"]) == {"ours"}


def test_a_running_server_is_a_side(tmp_path: Path, tiny: Path) -> None:
    wish = ("--prefill", 16, "--decode", 4, "--batch", 2, "--rounds", 1, "--threads", 1)
    with running_server(tmp_path, FAKE_SERVER) as url:
        done = compare(tiny, "--url", url, *wish)
    lines = done.stdout.splitlines()
    assert lines[1].split()[:2] == ["ours", "vLLM"]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        *("prefill 16", "decode at 0", "decode x2 at 32", "peak resident"),
    ]
    assert all("-" not in line.split()[-5:-4] for line in lines[2:5]), "each has its figure"
    with running_server(tmp_path, FAKE_SERVER.replace("LESS = 0", "LESS = 1")) as url:
        done = compare(tiny, "--url", url, *wish, ok=False)
    assert "gave 0 tokens where 1 were asked for" in done.stderr


def test_no_round_is_begun_that_would_end_too_late(tmp_path: Path, tiny: Path, gguf: Path) -> None:
    bench = program(tmp_path, "llama", FAKE_BENCH)
    done = compare(
        *(tiny, "--gguf", gguf, "--llama-bench", bench, "--rounds", 9, "--minutes", 0.001, "--prefill", 16),
        *("--depth", "none", "--threads", 1, "--json"),
    )
    assert json.loads(done.stdout)["num_rounds"] == 1
    assert "one more round would not fit in 0.001" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--llama-bench": "nowhere"}, "--llama-bench is nowhere; there is no such file"),
        ({"--llama-bench": "model.gguf"}, "which cannot be executed"),
        ({"--gguf": "missing.gguf"}, "--gguf is missing.gguf; there is no such file"),
        ({"--gguf": None}, "--gguf is missing"),
        ({"--llama-server": "nowhere"}, "--llama-server is nowhere; there is no such file"),
        ({"--ik-batched-bench": "nowhere"}, "--ik-batched-bench is nowhere; there is no such file"),
        ({"--rounds": "0"}, "--rounds is 0; expected at least 1"),
        ({"--batch": "1,4"}, "--batch has 1; expected at least 2"),
        ({"--prefill": "none", "--depth": "none"}, "no row is left"),
        ({"--url": "http://127.0.0.1:9"}, "http://127.0.0.1:9/v1/models gave no answer"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_measured(
    tmp_path: Path,
    tiny: Path,
    gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(COMPARE.parent)
    program(tmp_path, "llama-bench", FAKE_BENCH)
    options = {"--llama-bench": "./llama-bench", "--gguf": "model.gguf", **change}
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    code = importlib.import_module("compare").main([str(tiny), *words])
    said = capsys.readouterr()
    assert message in said.err and said.out == ""
    assert code == (1 if "--url" in change else 2)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('cannot load', file=sys.stderr); sys.exit(3)", "ended with 3: cannot load"),
        ("print('hello')", "printed no rows that can be read: 'hello"),
        ("print('[]')", "gave no figure for prefill 8"),
    ],
)
def test_a_failing_peer_is_quoted(tmp_path: Path, tiny: Path, gguf: Path, code: str, message: str) -> None:
    bench = program(tmp_path, "llama-bench", code)
    done = compare(
        *(tiny, "--llama-bench", bench, "--gguf", gguf, "--rounds", 1, "--prefill", 8, "--decode", 2),
        *("--threads", 1),
        ok=False,
    )
    assert message in done.stderr
