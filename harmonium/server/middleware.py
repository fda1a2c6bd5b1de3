"""What surrounds every route: request ids and log lines, keys, Host and Origin, the size of bodies.

Plain ASGI: nothing here buffers a stream or hides a disconnect.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harmonium.errors import ApiError
from harmonium.server.body import too_large
from harmonium.server.config import is_loopback
from harmonium.server.errors import error_response, log_defect
from harmonium.server.keys import KeyRing, key_of
from harmonium.server.page import page_files
from harmonium.server.state import ServerState

_access_log = logging.getLogger("harmonium.access")

OPEN_PATHS = frozenset({"/health", "/ready", *page_files()})
"""Routes that need no key: whoever watches a server has none, and the page asks for one itself."""

REQUEST_ID_HEADER = "x-request-id"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestLog:
    """Outermost: gives each request an id, answers 500 for our own defects, writes one log line.

    A client's x-request-id is kept when it is 1 to 128 letters, digits or ._:- and replaced otherwise.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get(REQUEST_ID_HEADER))
        scope.setdefault("state", {})["request_id"] = request_id
        tracing = self._state.tracing
        if tracing is None:
            await self._serve(scope, receive, send, request_id)
            return
        with tracing.request(scope, request_id) as span:
            status = await self._serve(scope, receive, send, request_id)
            span.set_attribute("http.response.status_code", status)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> int:
        """The status of the answer; 0 where the client left before it got one."""
        began = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log_defect(error, f"{scope['method']} {scope['path'][:200]!r}")
            if status == 0:
                await error_response(error)(scope, receive, send_with_id)
            else:
                raise  # the server cuts the connection: an answer that broke off must not look whole
        finally:
            self._log(scope, request_id, status, time.monotonic() - began)
        return status

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._state.metrics.responses.labels(route, str(status)).inc()
        if _access_log.isEnabledFor(logging.INFO):
            client = scope.get("client")
            record = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(seconds, 4),
                "client": client[0] if client else None,
            }
            _access_log.info("%s", json.dumps(record), extra={"fields": record})


def _request_id(given: str | None) -> str:
    return given if given is not None and _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


class Gate:
    """Who may come in: keys, and for a server on loopback only programs and pages of this machine.

    A page of the internet can make its own name mean 127.0.0.1 (DNS rebinding); its requests then carry that
    name as Host, and its Origin. Both are checked where no key protects us.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._config = state.config
        self._keys = KeyRing(state.config.api_keys)
        self._checks_host = is_loopback(state.config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._checks_host:
            error = self._host_refusal(headers)
            if error is not None:
                return error
        if scope["path"] in OPEN_PATHS or self._keys.accepts(key_of(headers)):
            return None
        return ApiError(
            "the API key is missing or wrong; send `Authorization: Bearer KEY`",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _host_refusal(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not is_loopback(_host_name(host)):
            return ApiError(
                f"Host is {host[:100]!r}; this server answers for localhost only",
                status=403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        is_own = origin is not None and origin.lower() in (
            f"http://{host}".lower(),
            f"https://{host}".lower(),
        )
        allowed = self._config.cors_origins
        if origin is None or is_own or origin in allowed or "*" in allowed:
            return None
        return ApiError(
            f"Origin is {origin[:100]!r}; --cors allows a web page to call",
            status=403,
            code="origin_not_allowed",
        )


def _host_name(host: str) -> str:
    """ "[::1]:8000" -> "::1", "localhost:8000" -> "localhost"."""
    if host.startswith("["):
        return host[1:].split("]", 1)[0]
    return host.rsplit(":", 1)[0] if host.count(":") == 1 else host


class BodyLimit:
    """Refuses a body by its announced length, before a byte of it is read; what is read counts in body.py."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._most = state.config.limits.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length = Headers(scope=scope).get("content-length", "0")
            if length.isdecimal() and (len(length) > 18 or int(length) > self._most):
                await error_response(too_large(self._most))(scope, receive, send)
                return
        await self._app(scope, receive, send)
