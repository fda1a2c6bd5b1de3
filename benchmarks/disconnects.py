"""Clients that leave at random points of a request: does the server give everything back?

`leave_all(state, app, count, seed)` serves the application in a thread of its own, lets so many clients leave
(a few at a time), waits until nothing runs any more and returns what is left over: answers that hold a slot,
asyncio tasks, background runs, requests and cache blocks of the engine. All must be 0.

Clients leave inside the headers or the body of their request, right after it, a moment later (while it waits
or its prompt is computed), after some bytes of the answer, or when a tool call has begun; with a clean end of
the connection or a reset. They ask over chat, responses, messages and completions, streamed and whole, with
background responses that are cancelled. Used by `benchmarks/soak.py --disconnects N` and by the tests.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import uvicorn
from fastapi import FastAPI

from harmonium.config import EngineConfig
from harmonium.engine import Script, ScriptedEngine
from harmonium.engine.statistics import EngineStatistics
from harmonium.script_file import harmony_tokens
from harmonium.server import ServerConfig, ServerState, create_app
from harmonium.server.serve import listen

Json = dict[str, Any]

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MESSAGES, COMPLETIONS = "/v1/messages", "/v1/completions"
POINTS = ("headers", "body", "sent", "moment", "bytes", "call")
CALL_MARKS = (b'"tool_calls"', b'"function_call"', b'"tool_use"')
TOOL_SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}


@dataclass
class Leftover:
    """What the server still held at the end. blocks: full-attention and window blocks in use."""

    slots: int = 0
    tasks: int = 0
    background: int = 0
    running: int = 0
    waiting: int = 0
    blocks: int = 0

    @property
    def is_nothing(self) -> bool:
        return not any(getattr(self, field.name) for field in fields(self))


@dataclass
class Served:
    """A server in a thread."""

    port: int
    loop: asyncio.AbstractEventLoop
    tasks_at_rest: int


def leave_all(
    state: ServerState, app: FastAPI, count: int, seed: int = 0, at_once: int = 12
) -> tuple[Counter[str], Leftover]:
    """(how many left at each point, what was left over)."""
    points: Counter[str] = Counter()
    with serving(app) as served:
        asyncio.run(_leave(served.port, count, seed, at_once, points))
        end = time.monotonic() + 60
        left = leftover(state, app, served)
        while not left.is_nothing and time.monotonic() < end:
            time.sleep(0.02)
            left = leftover(state, app, served)
    return points, left


def leftover(state: ServerState, app: FastAPI, served: Served) -> Leftover:
    """What is held now."""
    left = Leftover(
        slots=state.num_held,
        tasks=num_tasks(served.loop) - served.tasks_at_rest,
        background=len(app.state.responses.running),
    )
    engine = state.loaded_engine
    statistics = getattr(engine, "statistics", None)
    if isinstance(statistics, EngineStatistics):
        left.running, left.waiting = statistics.running, statistics.waiting
        left.blocks = statistics.full_blocks_used + statistics.window_blocks_used
    elif isinstance(engine, ScriptedEngine):
        left.running = engine.running
    return left


def num_tasks(loop: asyncio.AbstractEventLoop) -> int:
    """Tasks of a loop in another thread that are not over."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1  # without this one

    return asyncio.run_coroutine_threadsafe(count(), loop).result(30)


@contextmanager
def serving(app: FastAPI) -> Iterator[Served]:
    """The application on a free port of this machine."""
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Served(listener.getsockname()[1], loops[0], num_tasks(loops[0]))
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


async def _leave(port: int, count: int, seed: int, at_once: int, points: Counter[str]) -> None:
    free = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        chance = random.Random(seed * 100_003 + number)
        async with free:
            point = await asyncio.wait_for(leave_one(port, chance), 120)
        points[point] += 1

    await asyncio.gather(*(one(number) for number in range(count)))


async def leave_one(port: int, chance: random.Random) -> str:
    """One client's visit; at which point it left."""
    path, body = chance.choice(requests(chance))
    if body.get("background"):
        return await _cancel_background(port, chance, path, body)
    point = chance.choice(POINTS)
    content = json.dumps(body).encode()
    head = request_head(path, len(content))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    cut = {"headers": chance.randrange(1, len(head)), "body": len(head) + chance.randrange(len(content))}
    writer.write((head + content)[: cut.get(point, len(head) + len(content))])
    await writer.drain()
    if point in ("body", "moment"):
        await asyncio.sleep(chance.random() * 0.2)
    if point == "bytes":
        await read_some(reader, chance.randrange(1, 4000), ())
    if point == "call":
        await read_some(reader, 1 << 20, CALL_MARKS)
    if chance.random() < 0.5:  # a reset in place of a clean end
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    return point


async def _cancel_background(port: int, chance: random.Random, path: str, body: Json) -> str:
    """Start a background response and cancel it, or leave its stream and cancel it then."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_head(path, len(content)) + content)
    got = await read_some(reader, chance.randrange(1500, 4000), ())
    writer.close()
    at = got.find(b'"id":"resp_')
    if at < 0:
        return "background left early"
    name = got[at + 6 : got.index(b'"', at + 6)].decode()
    await asyncio.sleep(chance.random() * 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_head(f"{path}/{name}/cancel", 0))
    await reader.read()
    writer.close()
    return "background cancelled"


async def read_some(reader: asyncio.StreamReader, most: int, marks: tuple[bytes, ...]) -> bytes:
    """Read until so many bytes are there, one of the marks is, the answer ends or a second has passed."""
    got = b""
    end = time.monotonic() + 1.0
    try:
        while len(got) < most and not any(mark in got for mark in marks):
            block = await asyncio.wait_for(reader.read(512), max(0.01, end - time.monotonic()))
            if not block:
                break
            got += block
    except (asyncio.TimeoutError, ConnectionError):
        pass
    return got


def request_head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def requests(chance: random.Random) -> list[tuple[str, Json]]:
    """Bodies of every API whose answers are long."""
    text = " ".join(chance.choice(("sky", "tea", "why", "blue")) for _ in range(chance.randrange(1, 300)))
    messages = [{"role": "user", "content": text}]
    streamed = {"stream": chance.random() < 0.6}
    function = {"name": "look", "parameters": TOOL_SCHEMA}
    tools = {"tools": [{"type": "function", "function": function}]}
    flat = {"tools": [{"type": "function", **function}]}
    anthropic = {"tools": [{"name": "look", "input_schema": TOOL_SCHEMA}]}
    most = {"max_output_tokens": 400}
    return [
        (CHAT, {"messages": messages, "max_tokens": 400, **streamed}),
        (CHAT, {"messages": messages, "max_tokens": 400, "n": 2, **streamed}),
        (CHAT, {"messages": messages, "max_tokens": 400, "tool_choice": "required", **tools, **streamed}),
        (RESPONSES, {"input": text, **most, **streamed}),
        (RESPONSES, {"input": text, **most, "tool_choice": "required", **flat, **streamed}),
        (RESPONSES, {"input": text, **most, "background": True, **streamed}),
        (MESSAGES, {"model": "", "messages": messages, "max_tokens": 400, **streamed}),
        (MESSAGES, {"model": "", "messages": messages, "max_tokens": 400, **anthropic, **streamed}),
        (COMPLETIONS, {"prompt": text, "max_tokens": 400, **streamed}),
        (COMPLETIONS, {"prompt": [text, "tea"], "max_tokens": 400, **streamed}),
    ]


SCRIPTS = (
    "<|channel|>analysis<|message|>" + "think " * 40 + "<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.look <|constrain|>json<|message|>"
    '{"at":"' + "here " * 100 + '"}<|call|>',
    "<|channel|>final<|message|>" + "word " * 300 + "<|return|>",
)


def scripted_state() -> ServerState:
    """A server without a model, whose answers take a second or so."""
    engine = ScriptedEngine([Script(harmony_tokens(text)) for text in SCRIPTS], seconds_per_event=0.002)
    return ServerState(ServerConfig(max_concurrency=4, max_queue=64, uses_grammar=False), engine)


def native_state(model: str) -> ServerState:
    """A server over a checkpoint, one thread."""
    from harmonium.engine.create import create_engine
    from harmonium.loading import find_model

    config = EngineConfig(context_length=1024, max_sequences=4, threads=1)
    return ServerState(
        ServerConfig(max_concurrency=4, max_queue=64), create_engine(find_model(model), config)
    )


def report_departures(count: int, model: str, seed: int) -> int:
    """So many clients against each engine; prints what was left over. The exit code."""
    code = 0
    for name, state in (("scripted", scripted_state()), ("native", native_state(model))):
        began = time.monotonic()
        points, left = leave_all(state, create_app(state), count, seed)
        engine = state.loaded_engine
        assert engine is not None
        asyncio.run(engine.close())
        print(f"{name} engine: {count} clients left in {time.monotonic() - began:.0f} s; left over: {left}")
        print("  " + ", ".join(f"{point} {number}" for point, number in sorted(points.items())))
        code = code if left.is_nothing else 1
    return code
