"""How fast the server's front end is by itself: tokens a second, and what it adds to a token's time.

    python benchmarks/server_load.py [--api chat|responses|completions] [--streams 32] [--tokens 2000]

The server runs in a process of its own, on one core where the system lets us choose; the client, plain
sockets in this process, on another. There is no model: the script's tokens cost nothing, so that all that is
measured is rendering, events, JSON, HTTP.

Throughput: `harmonium serve --engine script:FILE`; all streams read at once, tokens that come as fast as they
can. Added latency: the same application over the same engine, which gives each stream a token every `--delay`
seconds and notes when (CLOCK_MONOTONIC, which all processes share); a token's added latency is from that
moment to the one at which the client has read its event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import uvicorn

from harmonium.engine.protocol import Request, TokenEvent
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.script_file import harmony_tokens
from harmonium.server import ServerConfig, ServerState, create_app
from harmonium.server.serve import listen

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "completions": "/v1/completions"}
# In an event of a token and in no other: what is counted as tokens that arrived.
MARKS = {"chat": b'"content":" ', "responses": b'"delta":" ', "completions": b'"text":" '}
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Figures:
    """What one run showed. Seconds, but for the rates."""

    api: str
    streams: int
    tokens_per_second: float
    tokens_per_cpu_second: float
    added_latency_median: float
    added_latency_p99: float
    latency_tokens_per_second: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--api", choices=sorted(PATHS), default="chat")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream (default 2000)")
    parser.add_argument("--delay", type=float, default=0.02, help="between tokens, for the latency (0.02)")
    parser.add_argument("--latency-tokens", type=int, default=200, help="of each stream, for the latency")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--stamps", type=Path, help=argparse.SUPPRESS)  # the server of the latency, itself
    options = parser.parse_args()
    if options.stamps is not None:
        asyncio.run(serve_stamped(options))
        return 0
    figures = measure(options)
    print(json.dumps(asdict(figures)) if options.json else report(figures))
    return 0


def measure(options: argparse.Namespace) -> Figures:
    """Both measurements, each with a server of its own."""
    tokens, wall, busy = throughput(options)
    added, rate = latencies(options)
    return Figures(
        api=options.api,
        streams=options.streams,
        tokens_per_second=tokens / wall,
        tokens_per_cpu_second=tokens / busy,
        added_latency_median=statistics.median(added),
        added_latency_p99=added[int(len(added) * 0.99)],
        latency_tokens_per_second=rate,
    )


def throughput(options: argparse.Namespace) -> tuple[int, float, float]:
    """(tokens, seconds, seconds of the server's CPU time)."""
    line = {"harmony": answer(options.tokens), "repeat": True}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "load.jsonl"
        script.write_text(json.dumps(line) + "\n", encoding="utf-8")
        command = ["-m", "harmonium", "serve", "--engine", f"script:{script}", "--port", "0", "--no-grammar"]
        with running([*command, "--max-concurrency", str(options.streams)]) as (port, pid):
            asyncio.run(run_streams(port, options.api, 2))  # imports and caches are warm from here
            busy, began = cpu_seconds(pid), time.monotonic()
            arrivals = asyncio.run(run_streams(port, options.api, options.streams))
            seconds, busy = time.monotonic() - began, cpu_seconds(pid) - busy
    tokens = sum(len(times) for times in arrivals.values())
    assert tokens == options.streams * options.tokens, f"{tokens:,} tokens came"
    return tokens, seconds, busy


def latencies(options: argparse.Namespace) -> tuple[list[float], float]:
    """(seconds that each token took from the engine to the client, ascending; tokens a second meanwhile)."""
    with tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder) / "stamps.json"
        command = [__file__, "--stamps", str(stamps), "--delay", str(options.delay)]
        command += ["--streams", str(options.streams), "--latency-tokens", str(options.latency_tokens)]
        with running(command) as (port, _):
            asyncio.run(run_streams(port, options.api, 1))
            arrivals = asyncio.run(run_streams(port, options.api, options.streams))
        sent: dict[str, list[float]] = json.loads(stamps.read_text())
    added: list[float] = []
    for stream, times in arrivals.items():
        stamped = next(times for request, times in sent.items() if request.startswith(stream))
        begun = stamped[-len(times) - 1 : -1]  # before them: a header's tokens; behind them: <|return|>
        assert len(times) == len(begun) == options.latency_tokens, f"{len(times):,} tokens came"
        added += [came - left for left, came in zip(begun, times, strict=True)]
    assert min(added) > 0, "a token was there before it left"
    every = [time for times in arrivals.values() for time in times]
    return sorted(added), len(every) / (max(every) - min(every))


def answer(num_tokens: int) -> str:
    """A turn whose text has so many tokens: each word is one."""
    words = (WORDS[number % len(WORDS)] for number in range(num_tokens))
    return f"<|channel|>final<|message|> {' '.join(words)}<|return|>"


class StampedEngine(ScriptedEngine):
    """Notes when each token leaves it."""

    def __init__(self, script: Script) -> None:
        super().__init__([script])
        self.stamps: dict[str, list[float]] = {}

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        times = self.stamps[request.request_id] = []
        async for event in super().generate(request):
            times.append(time.monotonic())
            yield event


async def serve_stamped(options: argparse.Namespace) -> None:
    """The server of the latency: until SIGTERM, then the stamps are written."""
    script = Script(harmony_tokens(answer(options.latency_tokens)), seconds_per_event=options.delay)
    engine = StampedEngine(script)
    state = ServerState(ServerConfig(max_concurrency=options.streams, uses_grammar=False), engine)
    config = uvicorn.Config(create_app(state), log_config=None, access_log=False, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()
    listener = listen("127.0.0.1", 0)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    loop.add_signal_handler(signal.SIGTERM, lambda: setattr(server, "should_exit", True))
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}\nready: ", file=sys.stderr, flush=True)
    await serving
    options.stamps.write_text(json.dumps(engine.stamps))


def report(figures: Figures) -> str:
    """The figures for people."""
    return (
        f"{figures.api}, {figures.streams} streams: {figures.tokens_per_second:,.0f} tokens/s "
        f"({figures.tokens_per_cpu_second:,.0f} a second of the server's CPU time)\n"
        f"added latency of a token at {figures.latency_tokens_per_second:,.0f} tokens/s: "
        f"median {figures.added_latency_median * 1e3:.2f} ms, "
        f"99 % below {figures.added_latency_p99 * 1e3:.2f} ms"
    )


@contextmanager
def running(arguments: list[str]) -> Iterator[tuple[int, int]]:
    """(port, process id) of a server that Python runs with these arguments."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    pin(process.pid)
    try:
        yield wait_for_port(process), process.pid
    finally:
        process.terminate()
        process.communicate(timeout=30)


def pin(pid: int) -> None:
    """The server on one core, we on the others, where that can be said."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0) | os.sched_getaffinity(pid))
        if len(cores) > 1:
            os.sched_setaffinity(pid, cores[:1])
            os.sched_setaffinity(0, cores[1:])


def wait_for_port(process: subprocess.Popen[str]) -> int:
    """The port that the server announces; returns when it is ready."""
    port = None
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
        port = int(found[1]) if found else port
        if "ready: " in line:
            assert port is not None
            return port
    raise RuntimeError("the server ended before it was ready")


def cpu_seconds(pid: int) -> float:
    """CPU time that this process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run_streams(port: int, api: str, count: int) -> dict[str, list[float]]:
    """For each of so many streams, by the id of its answer: when its tokens came."""
    return dict(await asyncio.gather(*(read_stream(port, api) for _ in range(count))))


BODIES: dict[str, dict[str, object]] = {
    "chat": {"messages": [{"role": "user", "content": "Count."}]},
    "responses": {"input": "Count.", "store": False},
    "completions": {"prompt": "Count.", "max_tokens": 100_000},
}


async def read_stream(port: int, api: str) -> tuple[str, list[float]]:
    """(id of the answer, when each of its tokens came)."""
    content = json.dumps({**BODIES[api], "stream": True}).encode()
    head = (
        f"POST {PATHS[api]} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + content)
    times: list[float] = []
    name, rest, mark = "", b"", MARKS[api]
    while block := await reader.read(1 << 16):
        now = time.monotonic()
        *events, rest = (rest + block).split(b"\n\n")
        times += [now] * sum(mark in event for event in events)
        if not name:
            found = re.search(rb'"id":"((?:chatcmpl|resp|cmpl)[-_]\w+)"', block)
            name = found[1].decode() if found else ""
    writer.close()
    return name, times


if __name__ == "__main__":
    raise SystemExit(main())
