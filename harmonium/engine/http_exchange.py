"""One HTTP/1.1 request on a connection of its own, and its answer piece by piece, each wait with an end.

A connection per request costs a fraction of a millisecond in a data center, and closing it is how a server
learns at once that nobody waits any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

from harmonium.errors import ConfigError

MAX_LINE_BYTES = 8 << 20
"""Of a server-sent event. A chunk of tokens with 20 alternatives each takes some kB."""

_READ_BYTES = 1 << 16
_MAX_HEAD_BYTES = 64 << 10


class ExchangeError(Exception):
    """The other side could not be reached, went away, or speaks no HTTP."""


class ExchangeTimeout(Exception):
    """The other side is there and took too long."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is. path: in front of every path, "" or such as "/vllm". text: as it was given."""

    host: str
    port: int
    is_tls: bool
    path: str
    text: str

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(text: str) -> Address:
    """'http://host:8000' or 'https://host/path'. Raises ConfigError for anything else."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{text[:200]!r} is no address of a server: {error}") from None
    is_plain = text.isascii() and text.isprintable() and " " not in text
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise ConfigError(f"{text[:200]!r} is no address of a server; expected such as http://host:8000")
    if parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"{text[:200]!r} has more than scheme, host, port and path; expected those alone")
    is_tls = parts.scheme == "https"
    return Address(
        parts.hostname, port or (443 if is_tls else 80), is_tls, parts.path.rstrip("/"), text.rstrip("/")
    )


class Exchange:
    """An answer on its way. `close` may be called from any thread, and ends what waits with ExchangeError.

    register: holds it from now until it is closed.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, register: set[Exchange]
    ) -> None:
        self._reader, self._writer = reader, writer
        self._register = register
        self._is_late = False
        register.add(self)
        self._loop = asyncio.get_running_loop()
        self._wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self.status = 0
        self.headers: dict[str, str] = {}

    async def send(self, request: h11.Request, body: bytes, seconds: float) -> None:
        """Send the request, read the answer's head. Raises ExchangeError, ExchangeTimeout."""
        end = self._loop.time() + seconds
        for event in (request, h11.Data(data=body), h11.EndOfMessage()):
            data = self._wire.send(event)
            if data:
                self._writer.write(data)
        with self._ending(seconds):
            await self._writer.drain()
        while True:
            event = await self._event(end - self._loop.time())
            if isinstance(event, h11.Response):
                break
            if not isinstance(event, h11.InformationalResponse):
                raise ExchangeError("the answer has no head")
        self.status = event.status_code
        self.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}

    async def _event(self, seconds: float) -> Any:
        """h11's next event."""
        end = self._loop.time() + seconds
        try:
            while True:
                event = self._wire.next_event()
                if event is not h11.NEED_DATA:
                    return event
                with self._ending(end - self._loop.time()):
                    data = await self._reader.read(_READ_BYTES)
                self._wire.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise ExchangeError(f"the answer is broken off or no HTTP ({error})") from None

    @contextlib.contextmanager
    def _ending(self, seconds: float) -> Iterator[None]:
        """Cut the connection when what is awaited inside takes longer.

        asyncio.wait_for would do, if before Python 3.12 it did not lose a cancellation that comes together
        with its result: then nobody would notice that a client has left.
        """
        timer = self._loop.call_later(max(seconds, 0.0), self._expire)
        try:
            yield
        except (OSError, EOFError) as error:
            self._check_time()
            raise ExchangeError(_reason(error)) from None
        finally:
            timer.cancel()
        self._check_time()

    def _expire(self) -> None:
        self._is_late = True
        self._abort()

    def _check_time(self) -> None:
        if self._is_late:
            raise ExchangeTimeout("nothing came in time")

    async def piece(self, seconds: float) -> bytes | None:
        """The next bytes of the body, None at its end. Raises ExchangeError, ExchangeTimeout."""
        event = await self._event(seconds)
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            return None
        raise ExchangeError("the answer is no HTTP")

    async def body(self, seconds: float, most_bytes: int) -> bytes:
        """All of the body. Raises ExchangeError, also where there is more; ExchangeTimeout."""
        end, parts, size = self._loop.time() + seconds, [], 0
        while (part := await self.piece(end - self._loop.time())) is not None:
            size += len(part)
            if size > most_bytes:
                raise ExchangeError(f"the answer has more than {most_bytes:,} bytes")
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Cut the connection. A second call does nothing."""
        self._register.discard(self)
        if _running_loop() is self._loop:
            self._abort()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        self._writer.transport.abort()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def open_exchange(
    address: Address,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    register: set[Exchange],
    connect_seconds: float,
    head_seconds: float,
) -> Exchange:
    """Connect, send, read the head of the answer; close what is returned. register: exchanges that are open.

    Raises ExchangeError, ExchangeTimeout (a connection that takes too long is an ExchangeError).
    """
    tls = ssl.create_default_context() if address.is_tls else None
    reader, writer = await _connect(address, tls, connect_seconds)
    exchange = Exchange(reader, writer, register)
    sent = {
        "host": address.host_header,
        "connection": "close",
        "content-length": str(len(body)),
        "content-type": "application/json",
        **headers,
    }
    request = h11.Request(method=method, target=f"{address.path}{path}", headers=list(sent.items()))
    try:
        await exchange.send(request, body, head_seconds)
    except BaseException:
        exchange.close()
        raise
    return exchange


async def _connect(
    address: Address, tls: ssl.SSLContext | None, seconds: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connecting = asyncio.create_task(asyncio.open_connection(address.host, address.port, ssl=tls))
    try:
        await asyncio.wait({connecting}, timeout=seconds)
    except asyncio.CancelledError:
        _abandon(connecting)
        raise
    if not connecting.done():
        _abandon(connecting)
        raise ExchangeError(f"no connection within {seconds:g} s")
    try:
        return connecting.result()
    except (OSError, ValueError) as error:  # ValueError: a host name that is none (UnicodeError)
        raise ExchangeError(_reason(error)) from None


def _abandon(connecting: asyncio.Task[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    """Cancel it; close the connection if it stands all the same."""

    def close(task: asyncio.Task[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        if not task.cancelled() and task.exception() is None:
            task.result()[1].transport.abort()

    connecting.cancel()
    connecting.add_done_callback(close)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or "connection lost"


class EventLines:
    """The `data:` lines of a stream of server-sent events; comments and other fields are skipped."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._rest = bytearray()
        self._lines: list[bytes] = []

    async def next(self, seconds: float) -> bytes | None:
        """What stands behind the next `data:`; None where the body ends. Raises as `Exchange.piece`."""
        end = asyncio.get_running_loop().time() + seconds
        while not self._lines:
            piece = await self._exchange.piece(end - asyncio.get_running_loop().time())
            if piece is None:
                return None
            self._push(piece)
        return self._lines.pop(0)

    def _push(self, piece: bytes) -> None:
        self._rest += piece
        *lines, rest = self._rest.split(b"\n") if b"\n" in piece else [self._rest]
        self._rest = bytearray(rest)
        if len(self._rest) > MAX_LINE_BYTES:
            raise ExchangeError(f"an event has more than {MAX_LINE_BYTES:,} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                self._lines.append(bytes(line[5:]).strip())


@contextlib.asynccontextmanager
async def closing(exchange: Exchange) -> AsyncGenerator[Exchange, None]:
    """Close the exchange on leaving."""
    try:
        yield exchange
    finally:
        exchange.close()
