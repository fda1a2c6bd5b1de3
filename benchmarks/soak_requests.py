"""Kinds of requests for the soak: what is sent, which statuses may come, how a whole answer ends."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
COMPLETIONS = "/v1/completions"
WORDS = ("sky", "blue", "why", "list", "count", "weather", "Paris", "code", "sum", "red", "tea", "<|end|>")


@dataclass(frozen=True)
class Outcome:
    """One request's end. status 0: we left before there was one. complaint: what is wrong with the body."""

    status: int
    body: bytes = b""
    retries_after: bool = False
    complaint: str = ""


class Connection:
    """A socket to the server, for one request after the other."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self.port = port
        self.chance = chance
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: Json | bytes | None = None, **how: Any) -> Outcome:
        """Send a request of its own connection and read the answer to its end.

        how: `pause` seconds before each piece that is read, `leave_after` bytes of the answer at which we
        leave (0: right after sending), `length` in place of the true content-length.
        """
        content = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        self.close()
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {how.get('length', len(content))}\r\n\r\n"
        )
        self._writer.write(head.encode() + content)
        leave_after = how.get("leave_after")
        if leave_after is None:
            return _parse(await self._read(reader, how.get("pause", 0.0)))
        await asyncio.sleep(self.chance.random() * 0.3)
        got = 0
        while got < leave_after and (block := await reader.read(512)):
            got += len(block)
        return Outcome(0)

    async def _read(self, reader: asyncio.StreamReader, pause: float) -> bytes:
        blocks = []
        while block := await reader.read(256 if pause else 1 << 16):
            blocks.append(block)
            if pause:
                await asyncio.sleep(pause)
        return b"".join(blocks)

    def close(self) -> None:
        """Leave."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def text(self, words: int = 6) -> str:
        """What a user may say."""
        return " ".join(self.chance.choice(WORDS) for _ in range(words))


def _parse(answer: bytes) -> Outcome:
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        raise EOFError(f"no answer but {answer[:100]!r}")
    headers = head.lower()
    if b"transfer-encoding: chunked" in headers:
        if not body.endswith(b"0\r\n\r\n"):
            return Outcome(int(head[9:12]), body, complaint="the answer broke off")
        body = _dechunk(body)
    return Outcome(int(head[9:12]), body, b"\r\nretry-after:" in headers)


def _dechunk(body: bytes) -> bytes:
    parts, at = [], 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size


Sender = Callable[[Connection], Awaitable[Outcome]]


@dataclass(frozen=True)
class Kind:
    """A kind of request. weight: how often it comes; expected: statuses besides declared 429 and 503."""

    name: str
    weight: int
    expected: tuple[int, ...]
    send: Sender


def chat(connection: Connection, **fields: Any) -> Json:
    """A chat completion's body."""
    message = {"role": "user", "content": connection.text()}
    most = connection.chance.randrange(1, 24)
    return {"messages": [message], "max_tokens": most, "temperature": 1, **fields}


TOOL: Json = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["a", "b"]}}, "required": ["at"]},
    },
}
FORMAT: Json = {
    "type": "json_schema",
    "json_schema": {
        "name": "n",
        "schema": {
            "type": "object",
            "properties": {"x": {"type": "integer", "maximum": 99}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


def post(path: str, **fields: Any) -> Sender:
    """A plain request with fields of its own."""

    async def send(connection: Connection) -> Outcome:
        body = {**_body(connection, path), **fields}
        return check_end(path, body, await connection.ask("POST", path, body))

    return send


def _body(connection: Connection, path: str) -> Json:
    if path.startswith(CHAT):
        return chat(connection)
    most = connection.chance.randrange(1, 24)
    if path == RESPONSES:
        return {"input": connection.text(), "max_output_tokens": most}
    if path == MESSAGES:
        message = {"role": "user", "content": connection.text()}
        return {"model": "", "messages": [message], "max_tokens": most}
    return {"prompt": connection.text(), "max_tokens": most}


def check_end(path: str, body: Json, outcome: Outcome) -> Outcome:
    """Whether a stream has its last event, and a whole answer is JSON."""
    if outcome.status != 200 or outcome.complaint:
        return outcome
    if not body.get("stream"):
        json.loads(outcome.body)
        return outcome
    last = outcome.body.rstrip().rsplit(b"\n\n", 1)[-1]
    ends = {CHAT: b"[DONE]", COMPLETIONS: b"[DONE]", MESSAGES: b"message_stop"}
    wanted = (ends[path],) if path in ends else (b"response.completed", b"response.incomplete")
    if not any(word in last for word in wanted):
        return Outcome(outcome.status, outcome.body, complaint="no last event")
    return outcome


def raw(path: str, content: bytes, **how: Any) -> Sender:
    """These bytes as a body."""

    async def send(connection: Connection) -> Outcome:
        return await connection.ask("POST", path, content, **how)

    return send


def get(path: str, method: str = "GET") -> Sender:
    """A request without a body."""

    async def send(connection: Connection) -> Outcome:
        return await connection.ask(method, path)

    return send


def leaving(path: str, **fields: Any) -> Sender:
    """A client that leaves somewhere in the answer."""

    async def send(connection: Connection) -> Outcome:
        body = {**_body(connection, path), **fields}
        after = connection.chance.choice((0, 0, 1, 200, 1000, 3000))
        return await connection.ask("POST", path, body, leave_after=after)

    return send


async def slow_reader(connection: Connection) -> Outcome:
    """Reads 256 bytes at a time with pauses."""
    body = chat(connection, stream=True)
    return check_end(CHAT, body, await connection.ask("POST", CHAT, body, pause=0.05))


async def huge_prompt(connection: Connection) -> Outcome:
    """A megabyte of text, far over the context."""
    body = chat(connection, messages=[{"role": "user", "content": "tea " * 250_000}])
    return await connection.ask("POST", CHAT, body)


async def background(connection: Connection) -> Outcome:
    """Started, cancelled or polled to its end, and deleted."""
    body = {**_body(connection, RESPONSES), "background": True}
    outcome = await connection.ask("POST", RESPONSES, body)
    if outcome.status != 200:
        return outcome
    path = f"{RESPONSES}/{json.loads(outcome.body)['id']}"
    if connection.chance.random() < 0.5:
        outcome = await connection.ask("POST", f"{path}/cancel")
    while json.loads(outcome.body)["status"] in ("queued", "in_progress"):
        await asyncio.sleep(0.1)
        outcome = await connection.ask("GET", path)
    return await connection.ask("DELETE", path)


async def chained(connection: Connection) -> Outcome:
    """A response and the one that continues it."""
    first = await connection.ask("POST", RESPONSES, _body(connection, RESPONSES))
    if first.status != 200:
        return first
    body = {**_body(connection, RESPONSES), "previous_response_id": json.loads(first.body)["id"]}
    return await connection.ask("POST", RESPONSES, body)


def _bad_schema(schema: Json) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}


_STREAM: Json = {"stream": True}
_DEEP = b'{"messages":' + b"[" * 50_000

KINDS: tuple[Kind, ...] = (
    Kind("chat", 8, (200,), post(CHAT)),
    Kind("chat streamed", 8, (200,), post(CHAT, **_STREAM)),
    Kind("chat of two choices", 2, (200,), post(CHAT, n=2, stream=True)),
    Kind("chat with tools", 4, (200,), post(CHAT, tools=[TOOL], tool_choice="required", stream=True)),
    Kind("chat with a schema", 4, (200,), post(CHAT, response_format=FORMAT)),
    Kind("chat with log-probabilities", 2, (200,), post(CHAT, logprobs=True, top_logprobs=5)),
    Kind("responses", 5, (200,), post(RESPONSES)),
    Kind("responses streamed", 5, (200,), post(RESPONSES, **_STREAM)),
    Kind("responses not stored", 3, (200,), post(RESPONSES, store=False)),
    Kind("responses in a chain", 3, (200,), chained),
    Kind("responses in background", 3, (200,), background),
    Kind("messages", 3, (200,), post(MESSAGES)),
    Kind("messages streamed", 3, (200,), post(MESSAGES, **_STREAM)),
    Kind("completions", 3, (200,), post(COMPLETIONS)),
    Kind("completions streamed", 3, (200,), post(COMPLETIONS, **_STREAM)),
    Kind("render", 1, (200,), post(CHAT + "/render")),
    Kind("tokenize", 1, (200,), raw("/tokenize", b'{"prompt": "tea <|end|>"}')),
    Kind("models", 1, (200,), get("/v1/models")),
    Kind("metrics", 1, (200,), get("/metrics")),
    Kind("unknown field", 2, (200,), post(CHAT, no_such_field={"a": [1]})),
    Kind("slow reader", 3, (200,), slow_reader),
    Kind("leaves chat", 4, (0,), leaving(CHAT)),
    Kind("leaves chat streamed", 6, (0,), leaving(CHAT, stream=True, max_tokens=500)),
    Kind("leaves responses", 3, (0,), leaving(RESPONSES, stream=True, max_output_tokens=500)),
    Kind("leaves messages", 3, (0,), leaving(MESSAGES, stream=True, max_tokens=500)),
    Kind("leaves completions", 3, (0,), leaving(COMPLETIONS, max_tokens=500)),
    Kind("malformed JSON", 3, (400,), raw(CHAT, b'{"messages": [')),
    Kind("no UTF-8", 1, (400,), raw(CHAT, b"\xff\xfe\x00{")),
    Kind("nested too deep", 1, (400,), raw(CHAT, _DEEP)),
    Kind("array for a body", 1, (400,), raw(RESPONSES, b"[1, 2]")),
    Kind("announces too much", 1, (413,), raw(CHAT, b"{}", length=1 << 30)),
    Kind("prompt too long", 1, (400,), huge_prompt),
    Kind("wrong type", 2, (400,), post(CHAT, temperature="hot")),
    Kind("out of range", 2, (400,), post(CHAT, top_p=7)),
    Kind("schema that is none", 2, (400,), post(CHAT, response_format=_bad_schema({"type": "nothing"}))),
    Kind(
        "schema with a false reference", 2, (400,), post(CHAT, response_format=_bad_schema({"$ref": "#/x"}))
    ),
    Kind("unknown model", 2, (404,), post(CHAT, model="gpt-9")),
    Kind("unknown response continued", 2, (404,), post(RESPONSES, previous_response_id="resp_none")),
    Kind("unknown response read", 1, (404,), get(RESPONSES + "/resp_none")),
    Kind("unknown route", 1, (404,), get("/v1/nothing")),
    Kind("wrong method", 1, (405,), get(CHAT, "DELETE")),
)
