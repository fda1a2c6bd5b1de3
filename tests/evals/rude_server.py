"""A server that answers as it is told to: statuses, headers, broken streams. For the client's tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """status and headers of one response. lines: what it sends; a stream is closed after them."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


@dataclass
class RudeServer:
    """answers: for POST, in turn, the last one again and again. bodies: what was asked."""

    url: str
    answers: list[Answer]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def chunk(**delta: Any) -> str:
    """A line of a stream with this delta."""
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def ended(reason: str = "stop", **usage: Any) -> list[str]:
    """The last lines of a stream."""
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "usage": usage or None}
    return ["data: " + json.dumps(last), "data: [DONE]"]


def said(text: str, reason: str = "stop", **usage: Any) -> Answer:
    """A whole stream."""
    return Answer(lines=[chunk(content=text), *ended(reason, **usage)])


def refused(status: int, message: str = "no", **headers: str) -> Answer:
    """An error answer as OpenAI's API gives it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, names, [json.dumps({"error": {"message": message}})])


@contextmanager
def rude_server(*answers: Answer, models: tuple[str, ...] = ("rude",)) -> Iterator[RudeServer]:
    """Runs on a free port of this machine."""
    told = RudeServer("", list(answers))

    class Responder(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(Answer(lines=[json.dumps({"data": [{"id": name} for name in models]})]))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            told.bodies.append(json.loads(raw))
            told.headers.append({name.lower(): value for name, value in self.headers.items()})
            self._send(told.answers.pop(0) if len(told.answers) > 1 else told.answers[0])

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write("".join(f"{line}\n\n" for line in answer.lines).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Responder)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
