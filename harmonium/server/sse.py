"""Server-sent events, and the end of work that nobody waits for.

An `EventStream` closes its source when the client leaves, is too slow or the server stops; the source is a
generator that holds an engine's answer, so that closing it frees slot and cache blocks (docs/engine.md).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from harmonium.errors import ApiError
from harmonium.server.errors import error_object, log_defect
from harmonium.server.state import state_of

KEEP_ALIVE_SECONDS = 15.0
"""A comment goes out when nothing else did for this long: proxies cut silent connections."""

DONE = b"data: [DONE]\n\n"

_KEEP_ALIVE = b": keep-alive\n\n"


def encode_json(value: object) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(data: object, name: str | None = None) -> bytes:
    """One event. JSON holds no line ends, so one `data:` line is enough."""
    if name is None:
        return b"data: %b\n\n" % encode_json(data)
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode_json(data))


async def with_error_event(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The source's events; if it fails on the way, OpenAI's error object as the last one."""
    try:
        async for chunk in source:
            yield chunk
    except Exception as error:
        log_defect(error, "a stream")
        yield event(error_object(error))
    finally:
        await source.aclose()


class EventStream(Response):
    """A response that sends what `source` yields, each item as soon as it is there, and then closes it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        idle_write_seconds: float = 120.0,
    ) -> None:
        self._source = source
        self._idle_write_seconds = idle_write_seconds
        self._last_chunk = time.monotonic()
        self._sending_since: float | None = None
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        listener = asyncio.create_task(disconnected(receive))
        try:
            while not (writer.done() or listener.done() or self._is_stuck()):
                await asyncio.wait({writer, listener}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                await self._keep_alive(writer, send)
        finally:
            listener.cancel()
            writer.cancel()
            await asyncio.gather(writer, listener, return_exceptions=True)
            await self._source.aclose()
        if not writer.cancelled():
            writer.result()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._source:
            self._sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._sending_since = None
            self._last_chunk = time.monotonic()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, writer: asyncio.Task[None], send: Send) -> None:
        is_silent = time.monotonic() - self._last_chunk > KEEP_ALIVE_SECONDS
        if is_silent and self._sending_since is None and not writer.done():
            self._last_chunk = time.monotonic()
            await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})

    def _is_stuck(self) -> bool:
        """Whether the client has taken nothing for so long that it counts as gone."""
        since = self._sending_since
        return since is not None and time.monotonic() - since > self._idle_write_seconds


def event_stream(
    request: Request, source: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None
) -> EventStream:
    """A stream for this request; a failure on the way is its last event."""
    seconds = state_of(request).config.idle_write_seconds
    return EventStream(with_error_event(source), headers, seconds)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


T = TypeVar("T")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client leaves before it ends.

    For answers in one piece; the request's body must have been read. Raises ApiError (499) when the client
    has left, and what the work raises.
    """
    worker = asyncio.create_task(work)
    listener = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({worker, listener}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        listener.cancel()
        if not worker.done():
            worker.cancel()
        await asyncio.gather(worker, listener, return_exceptions=True)
    if worker.cancelled():
        raise ApiError("the client left", status=499, code="client_closed_request")
    return worker.result()
