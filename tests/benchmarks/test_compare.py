"""compare.py against a stand-in for llama.cpp's programs: scripts that print what those print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import harmonium
from harmonium.testing import make_tiny_checkpoint

COMPARE = Path(__file__).parents[2] / "benchmarks" / "compare.py"

FAKE_BENCH = """\
import json, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
open(sys.argv[0] + ".log", "a").write(json.dumps(sys.argv[1:]) + "\\n")
rows = []
for depth in map(int, arguments["-d"].split(",")):
    for prompt in map(int, arguments["-p"].split(",")):
        if prompt:
            rows.append({"n_prompt": prompt, "n_gen": 0, "n_depth": depth, "avg_ts": 0.5})
    for generated in map(int, arguments["-n"].split(",")):
        if generated:
            rows.append({"n_prompt": 0, "n_gen": generated, "n_depth": depth, "avg_ts": 0.25 + depth})
for row in rows:
    row |= {"build_commit": "abc", "build_number": 7, "model_type": "gpt-oss"}
print(json.dumps(rows))
"""

FAKE_SERVER = """\
import http.server, json, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
ready = time.monotonic() + 0.3
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if time.monotonic() > ready else 503)
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *arguments):
        pass
http.server.HTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("compare") / "tiny", vocabulary_size=500)


def program(folder: Path, name: str, code: str) -> Path:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)
    return path


def compare(*arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMPARE), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(harmonium.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == ok, done.stderr
    return done


def test_rounds_alternate_and_ratios_are_ours_over_theirs(tmp_path: Path, tiny: Path) -> None:
    bench = program(tmp_path, "llama-bench", FAKE_BENCH)
    server = program(tmp_path, "llama-server", FAKE_SERVER)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    done = compare(
        *(tiny, "--llama-bench", bench, "--llama-server", server, "--gguf", gguf, "--json"),
        *("--rounds", 2, "--prefill", 16, "--decode", 4, "--depth", "0,8", "--threads", 1),
        *("--llama-arguments", "-fa off"),
    )
    record = json.loads(done.stdout)
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["prefill 16", "decode at 0", "decode at 8", "ready", "ready again", "peak resident"]
    assert rows["prefill 16"]["theirs"] == 0.5
    assert rows["decode at 0"]["theirs"] == 0.25 and rows["decode at 8"]["theirs"] == 8.25
    for name in ("prefill 16", "decode at 8"):
        ratios = [
            next(
                row["tokens_per_second"]
                for row in one["ours"]["rows"]
                if row["kind"] == name.split()[0] and row["depth"] == int(name[-1]) * (name[0] == "d")
            )
            / rows[name]["theirs"]
            for one in record["rounds"]
        ]
        assert rows[name]["ratio"] == pytest.approx(sum(ratios) / 2)
        assert rows[name]["limit"] > rows[name]["ours"]
    assert rows["ready"]["theirs"] > 0.3
    assert rows["ready"]["ratio"] > 1, "the stand-in takes longer than the tiny model"
    assert rows["peak resident"]["theirs"] < 1
    assert record["machine"]["read_bandwidth"] > 1e8
    assert record["llama_build"] == {"build_commit": "abc", "build_number": 7, "model_type": "gpt-oss"}
    steps = [line.split(": ")[1] for line in done.stderr.splitlines() if line.startswith("round")]
    assert steps == ["ours", "theirs", "ours", "theirs"]
    calls = [json.loads(line) for line in Path(f"{bench}.log").read_text().splitlines()]
    assert len(calls) == 4, "prompts and depths apart, in each of two rounds"
    for call in calls:
        assert call[:2] == ["-m", str(gguf)] and call[4:6] == ["-t", "1"] and call[-6:-4] != ["-lm", "none"]
        assert "-fa" in call and call[call.index("-fa") + 1] == "off"


def test_table_stands_without_a_server(tmp_path: Path, tiny: Path) -> None:
    bench = program(tmp_path, "llama-bench", FAKE_BENCH)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    done = compare(
        *(tiny, "--llama-bench", bench, "--gguf", gguf, "--rounds", 1),
        *("--prefill", 16, "--decode", 4, "--threads", 1),
    )
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        *("prefill 16", "decode at 0", "ready", "ready again", "peak resident"),
    ]
    assert lines[4].split()[-4:-3] == ["-"], "nothing to compare the start with"
    calls = Path(f"{bench}.log").read_text().splitlines()
    assert len(calls) == 1 and '"-lm", "none"' in calls[0] and '"--repack", "1"' in calls[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--llama-bench": "nowhere"}, "--llama-bench is nowhere; there is no such file"),
        ({"--llama-bench": "model.gguf"}, "which cannot be executed"),
        ({"--gguf": "missing.gguf"}, "--gguf is missing.gguf; there is no such file"),
        ({"--llama-server": "nowhere"}, "--llama-server is nowhere; there is no such file"),
        ({"--rounds": "0"}, "--rounds is 0; expected at least 1"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_measured(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    program(tmp_path, "llama-bench", FAKE_BENCH)
    Path("model.gguf").write_bytes(b"GGUF")
    options = {"--llama-bench": "./llama-bench", "--gguf": "model.gguf", **change}
    done = compare(tiny, *[word for pair in options.items() for word in pair], ok=False)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('cannot load', file=sys.stderr); sys.exit(3)", "ended with 3: cannot load"),
        ("print('hello')", "printed no rows that can be read: 'hello"),
    ],
)
def test_a_failing_peer_is_quoted(tmp_path: Path, tiny: Path, code: str, message: str) -> None:
    bench = program(tmp_path, "llama-bench", code)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    done = compare(
        *(tiny, "--llama-bench", bench, "--gguf", gguf, "--rounds", 1, "--prefill", 8, "--decode", 2),
        *("--threads", 1),
        ok=False,
    )
    assert message in done.stderr
