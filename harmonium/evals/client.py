"""One chat completion after another from a server that speaks OpenAI's API, with patience where it is asked
for.

Standard library alone. Answers are streamed: a connection on which nothing comes for `silence_seconds` is
dead, however long an answer takes. 429, 502, 503 and 504 are tried again, after Retry-After where it is
given; a connection that cannot be had or breaks is tried again a few times; everything else is the item's
error.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from harmonium.errors import ConfigError
from harmonium.evals.item import Reply
from harmonium.evals.stream import ReplyBuilder, StreamFailed

RETRIED = (429, 502, 503, 504)
MAX_WAIT_SECONDS = 900.0
"""In all, for one item: a server that stays full for longer is not going to answer."""
MAX_BROKEN = 4
"""Connections that failed or broke, for one item."""
MAX_LINE_BYTES = 16 << 20


class AskFailed(Exception):
    """No reply to this item. is_connection: nobody was there, rather than an answer that says no."""

    def __init__(self, message: str, is_connection: bool = False) -> None:
        super().__init__(message)
        self.is_connection = is_connection


class Stopped(Exception):
    """The run ends while this item was waited for."""


class _TryAgain(Exception):
    def __init__(self, reason: str, seconds: float | None = None, is_connection: bool = False) -> None:
        super().__init__(reason)
        self.seconds = seconds
        self.is_connection = is_connection


@dataclass(frozen=True, slots=True)
class Address:
    """Where the API is: scheme, host, port and the path that ends in /v1 (or whatever was given)."""

    scheme: str
    host: str
    port: int | None
    path: str

    @staticmethod
    def parse(url: str) -> Address:
        """An address without a path gets /v1. Raises ConfigError for what is no http(s) address."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--base-url is {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url is {url!r}; expected such as http://127.0.0.1:8000/v1")
        return Address(parts.scheme, parts.hostname, port, parts.path.rstrip("/") or "/v1")

    def __str__(self) -> str:
        port = f":{self.port}" if self.port is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{port}{self.path}"


class ChatClient:
    """Calls may come from several threads at once; each has a connection of its own."""

    def __init__(self, address: Address, api_key: str | None = None, silence_seconds: float = 600.0) -> None:
        """api_key: sent as a bearer token. silence_seconds: longest wait for the next byte."""
        self.address = address
        self._api_key = api_key
        self._silence_seconds = silence_seconds
        self._stop = threading.Event()

    def stop(self) -> None:
        """Whoever waits to try again gets Stopped."""
        self._stop.set()

    def model_names(self) -> list[str]:
        """Names at GET /models, none while the server loads (503). Raises ConfigError with another reason."""
        connection = self._connection()
        try:
            connection.request("GET", f"{self.address.path}/models", headers=self._headers())
            with connection.getresponse() as response:
                raw = response.read(MAX_LINE_BYTES)
            if response.status == 503:
                return []
            if response.status != 200:
                raise ConfigError(f"{self.address}/models answers {_told(response.status, raw)}")
            return [str(entry["id"]) for entry in json.loads(raw)["data"]]
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"nobody answers at {self.address} ({_reason(error)})") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.address}/models does not answer as OpenAI's API does") from None
        finally:
            connection.close()

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """The reply to this chat completion request (stream is added). Raises AskFailed, Stopped."""
        waited, broken, retries = 0.0, 0, 0
        raw = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        while True:
            try:
                return self._attempt(raw, retries)
            except _TryAgain as again:  # noqa: PERF203 - it is what the loop is for
                broken += again.is_connection
                seconds = min(2.0**retries, 60.0) if again.seconds is None else again.seconds
                waited += seconds
                if broken >= MAX_BROKEN or waited > MAX_WAIT_SECONDS:
                    raise AskFailed(f"{again} ({retries + 1} tries)", again.is_connection) from None
                retries += 1
                if self._stop.wait(seconds):
                    raise Stopped from None

    def _attempt(self, raw: bytes, retries: int) -> Reply:
        started = time.monotonic()
        connection = self._connection()
        try:
            connection.request("POST", f"{self.address.path}/chat/completions", raw, self._headers())
            with connection.getresponse() as response:
                if response.status != 200:
                    self._refuse(response)
                builder = ReplyBuilder(started, retries)
                for event in _events(response):
                    builder.push(event)
                return builder.finish()
        except StreamFailed as error:
            raise AskFailed(str(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(f"no answer from {self.address}: {_reason(error)}", is_connection=True) from None
        finally:
            connection.close()

    def _refuse(self, response: http.client.HTTPResponse) -> None:
        told = _told(response.status, response.read(MAX_LINE_BYTES))
        if response.status in RETRIED:
            raise _TryAgain(told, _retry_after(response.getheader("retry-after")))
        raise AskFailed(told)

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
        return kind(self.address.host, self.address.port, timeout=self._silence_seconds)

    def _headers(self) -> dict[str, str]:
        key = {"authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        return {"content-type": "application/json", "connection": "close", **key}


def _events(response: http.client.HTTPResponse) -> Iterator[Mapping[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]. Raises OSError for a stream that ends without it."""
    while True:
        line = response.readline(MAX_LINE_BYTES)
        if not line:
            raise ConnectionError("the stream broke off")
        if not line.startswith(b"data:"):
            continue  # comments and names of events
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise StreamFailed(f"an event is no JSON: {data[:200]!r}") from None
        if not isinstance(event, dict):
            raise StreamFailed(f"an event is no object: {data[:200]!r}")
        yield event


def _retry_after(value: str | None) -> float | None:
    """Seconds of the header, which holds a number or a date; None where there is none that makes sense."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return min(max(float(value), 0.05), MAX_WAIT_SECONDS)
    with contextlib.suppress(ValueError, TypeError):
        left = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return min(max(left, 0.05), MAX_WAIT_SECONDS)
    return None


def _told(status: int, raw: bytes) -> str:
    """The status and what the server's error object says."""
    message = raw[:300].decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        message = str(json.loads(raw)["error"]["message"])
    return f"HTTP {status}: {message}" if message else f"HTTP {status}"


def _reason(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__
