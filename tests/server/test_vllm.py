"""`harmonium serve` over vLLM: two servers of which one dies, one that we start ourselves, the options."""

from __future__ import annotations

import asyncio
import contextlib
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
import tests.vllm_stub
from harmonium.engine.connect import Wanted, connect, parse_upstreams
from harmonium.engine.upstream import RemoteSettings
from harmonium.engine.vllm_process import vllm_command
from harmonium.errors import ConfigError
from harmonium.options import parse
from harmonium.server import ServerConfig, ServerState, create_app
from harmonium.server.remote import remote_source
from tests.server.client import HELLO, call, error_of
from tests.server.live import wait_until

ROOT = Path(tests.vllm_stub.__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(harmonium.__file__).parent.parent)}
"""The package that is tested comes first, installed or not; the tests beside it in the source tree last."""

ANSWER = {"harmony": f"<|channel|>final<|message|>{'word ' * 20}<|return|>", "repeat": True}
PATH = "/v1/chat/completions"


@contextmanager
def stub_process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A stub in a process of its own, and its address."""
    text = ANSWER["harmony"]
    code = f"import sys; sys.path.append({str(ROOT)!r}); from tests.vllm_stub import run_forever as run"
    code += f"; run({text!r}, 0.02)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=ENVIRONMENT) as child:
        assert child.stdout is not None
        try:
            url = child.stdout.readline().strip()
            assert url
            yield child, url
        finally:
            child.kill()


def test_one_of_two_upstreams_is_killed_and_no_request_fails_that_had_not_begun(tmp_path: Path) -> None:
    """Under load; those that had begun go on behind their tokens."""
    settings = RemoteSettings(check_seconds=0.1, start_seconds=30.0)
    num = 60

    async def one(client: httpx.AsyncClient, number: int) -> tuple[str, str]:
        """The text that came, and how the stream ended."""
        body = {"messages": [{"role": "user", "content": f"{number} " * 300}], "stream": True}
        text = last = ""
        async with client.stream("POST", PATH, json=body, timeout=60) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    text += choices[0].get("delta", {}).get("content") or ""
        return text, last

    async def run(victim: subprocess.Popen[str], urls: list[str]) -> tuple[list[tuple[str, str]], Any]:
        engine = await connect(parse_upstreams(urls, settings), Wanted(), settings)
        state = ServerState(ServerConfig(max_concurrency=200), engine)
        transport = httpx.ASGITransport(create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            tasks = []
            for number in range(num):
                tasks.append(asyncio.create_task(one(client, number)))
                await asyncio.sleep(0.01)
                if number == num // 2:
                    victim.kill()
            ends = await asyncio.gather(*tasks)
        statistics = engine.statistics
        await engine.close()
        assert state.num_held == 0
        return list(ends), statistics

    with stub_process(tmp_path) as (victim, first), stub_process(tmp_path) as (_, second):
        ends, statistics = asyncio.run(run(victim, [first, second]))
    dead, alive = statistics.upstreams
    assert (dead.is_up, alive.is_up) == (False, True)
    assert dead.requests > 0 and alive.requests > num // 2
    assert ends == [("word " * 20, "data: [DONE]")] * num
    assert statistics.retries + statistics.resumed > 0  # which of the two: by the moment of the kill


def test_no_upstream_is_a_503_with_retry_after() -> None:
    from harmonium.engine.http_exchange import parse_address
    from harmonium.engine.protocol import EngineInfo
    from harmonium.engine.remote import RemoteEngine
    from harmonium.engine.upstream import Upstream

    upstream = Upstream(parse_address("http://127.0.0.1:1"), is_up=True)
    engine = RemoteEngine([upstream], EngineInfo("m", 1000, 201_088, "vllm"))
    state = ServerState(ServerConfig(), engine)
    for fields in ({"messages": HELLO}, {"messages": HELLO}, {"messages": HELLO, "stream": True}):
        response = call(state, "POST", PATH, json=fields)
        assert error_of(response, 503)["code"] == "upstream_unavailable"
        assert response.headers["retry-after"] == "5"
    metrics = call(state, "GET", "/metrics").text
    assert 'harmonium:upstream_up{upstream="http://127.0.0.1:1"} 0.0' in metrics
    assert 'harmonium:upstream_ejections_total{upstream="http://127.0.0.1:1"} 1.0' in metrics
    assert "harmonium:upstream_retries_total 0.0" in metrics
    asyncio.run(engine.close())


FAKE = """#!{python}
import sys, os
sys.path.append({root!r})
words = sys.argv[1:]
print("vLLM API server version 0.0", flush=True)
print("line with " + " ".join(words), flush=True)
if "--fail" in words:
    print("RuntimeError: no room for the cache", flush=True)
    sys.exit(3)
assert words[0] == "serve", words
port = int(words[words.index("--port") + 1])
from pathlib import Path
with open(words[words.index("--pids") + 1], "a") as file:
    file.write(f"{{os.getpid()}}\\n")
if "--sleep" in words:
    import time
    time.sleep(600)
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from harmonium.script_file import scripted_engine
from tests.vllm_stub import Stub, VllmServer
script = words[words.index("--script") + 1]
stub = Stub(scripted_engine(Path(script)), model=words[1], key=os.environ["VLLM_API_KEY"])
server = VllmServer()
server.stubs["only"] = stub
class Put:
    def __init__(self, app): self.app = app
    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            scope = dict(scope, path="/only" + scope["path"])
        await self.app(scope, receive, send)
uvicorn.run(Put(server.app), host="127.0.0.1", port=port, log_level="warning", lifespan="off", ws="none")
"""


class Launched:
    """`harmonium serve MODEL --launch-vllm` with a program that plays vLLM."""

    def __init__(self, folder: Path, *words: str) -> None:
        program = folder / "vllm"
        program.write_text(FAKE.format(python=sys.executable, root=str(ROOT)), encoding="utf-8")
        program.chmod(0o755)
        script = folder / "answers.jsonl"
        script.write_text(json.dumps(ANSWER), encoding="utf-8")
        self.pids = folder / "pids"
        command = [sys.executable, "-m", "harmonium"]
        command += ["serve", "20b", "--launch-vllm", "--vllm-command", str(program), "--port", "0"]
        command += ["--", "--script", str(script), "--pids", str(self.pids), *words]
        self.lines: list[str] = []
        self.child = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=folder,
            env=ENVIRONMENT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        self.lines.extend(self.child.stderr)

    def wait_for(self, pattern: str) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            return next((match for line in list(self.lines) if (match := re.search(pattern, line))), None)

        with contextlib.suppress(AssertionError):
            wait_until(lambda: found() is not None or self.child.poll() is not None, 60)
        match = found()
        assert match is not None, self.lines
        return match

    @property
    def url(self) -> str:
        return self.wait_for(r"listening on (http://\S+:\d+)")[1]

    def children(self) -> list[int]:
        return [int(word) for word in self.pids.read_text().split()]

    def ask(self) -> httpx.Response:
        return httpx.post(f"{self.url}{PATH}", json={"messages": HELLO}, timeout=30)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        self._reader.join()
        assert self.child.stderr is not None
        self.child.stderr.close()


@contextmanager
def launched(folder: Path, *words: str) -> Iterator[Launched]:
    server = Launched(folder, *words)
    try:
        yield server
    finally:
        server.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


def test_vllm_is_started_restarted_when_it_dies_and_stopped_at_the_end(tmp_path: Path) -> None:
    with launched(tmp_path) as server:
        server.wait_for("ready: openai/gpt-oss-20b")
        assert server.ask().json()["choices"][0]["message"]["content"].startswith("word")
        (first,) = server.children()
        os.kill(first, signal.SIGKILL)
        server.wait_for("vLLM is started again .1 of 3.")
        wait_until(lambda: len(server.children()) == 2, 60)
        wait_until(lambda: server.ask().status_code == 200, 60)
        second = server.children()[-1]
        assert is_alive(second)
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(60) == 0
        wait_until(lambda: not is_alive(second))


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_vllm_does_not_outlive_a_killed_server(tmp_path: Path) -> None:
    with launched(tmp_path) as server:
        server.wait_for("ready: ")
        (pid,) = server.children()
        server.child.kill()
        wait_until(lambda: not is_alive(pid), 30)


def test_vllm_that_is_still_starting_is_stopped_with_the_server(tmp_path: Path) -> None:
    with launched(tmp_path, "--sleep") as server:
        wait_until(lambda: server.pids.exists() and server.children(), 60)
        assert httpx.get(f"{server.url}/health").json()["status"] == "loading"
        (pid,) = server.children()
        server.child.send_signal(signal.SIGTERM)
        server.child.wait(60)
        wait_until(lambda: not is_alive(pid))


def test_vllm_that_cannot_start_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    with launched(tmp_path, "--fail") as server:
        assert server.child.wait(60) == 1
        server.wait_for("vLLM ended with code 3.*RuntimeError: no room for the cache")


def test_vllm_that_is_not_installed_is_told() -> None:
    from harmonium.cli import main

    assert main(["serve", "20b", "--launch-vllm", "--vllm-command", "/no/such/vllm", "--port", "0"]) == 2


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("spelling", ["--tensor-parallel-size {}", "-tp {}", "--tensor-parallel-size={}"])
def test_b83_parallel_sizes_that_divide_the_heads_are_passed_on(size: int, spelling: str) -> None:
    words = spelling.format(size).split()
    command = vllm_command("vllm", "openai/gpt-oss-120b", [*words, "--enable-expert-parallel"])
    assert command.words[:3] == ("vllm", "serve", "openai/gpt-oss-120b")
    assert set(words) < set(command.words) and "--enable-expert-parallel" in command.words


@pytest.mark.parametrize("size", ["3", "5", "0", "128", "x", ""])
def test_b83_other_sizes_are_refused_before_anything_starts(size: str) -> None:
    with pytest.raises(ConfigError, match="expected one of 1, 2, 4, 8, 16, 32, 64"):
        vllm_command("vllm", "20b", ["--tensor-parallel-size", size])


def source_of(line: str) -> Any:
    return remote_source(parse(line.split()))


def test_options_say_which_servers() -> None:
    source = source_of("serve openai/gpt-oss-20b --engine vllm=http://a:8000,http://b:8000/x")
    assert (source.model, source.urls) == ("openai/gpt-oss-20b", ("http://a:8000", "http://b:8000/x"))
    assert source_of("serve tiny") is None
    launch = source_of("serve 20b --launch-vllm --port 9 -- -tp 2 --max-model-len 100")
    assert (launch.arguments, launch.urls) == (("-tp", "2", "--max-model-len", "100"), ())
    assert parse(["serve", "20b", "--launch-vllm"]).max_concurrency == 256
    assert parse(["serve", "20b", "--engine", "vllm=http://a", "--max-concurrency", "7"]).max_concurrency == 7
    assert parse(["serve", "tiny"]).max_concurrency == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("serve 20b --launch-vllm --engine vllm=http://a", "expected one"),
        ("serve --launch-vllm", "needs MODEL"),
        ("serve 20b --launch-vllm -- --port 1", "Harmonium sets where"),
        ("serve 20b -- -tp 2", "--launch-vllm is not given"),
        ("serve 20b --engine vllm=", "no address"),
        ("serve 20b --engine vllm=http://a,http://a", "twice"),
        ("serve 20b --tensor-parallel-size 2", "--launch-vllm"),
    ],
)
def test_options_that_do_not_go_together_are_told(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source_of(line)
