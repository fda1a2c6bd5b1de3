"""HTTP as a hub needs it: GET, redirects, ranges, and a token that stays with its host.

Python's own library: huggingface_hub 2.4 and what it needs take 24 MB installed, which the base install has
no room for, and the file interfaces of both hubs are a handful of addresses.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

from harmonium import __version__
from harmonium.errors import ConfigError, HubError

MAX_JSON_BYTES = 32 << 20
_MAX_DETAIL_BYTES = 4096
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524})


class Unreachable(HubError):
    """Nothing answered, or an answer broke off: the same request may succeed later."""


class Refusal(HubError):
    """An HTTP status other than success. code: what the hub calls it (X-Error-Code), or ""."""

    def __init__(self, message: str, http_status: int, code: str, retry_after_seconds: float | None) -> None:
        super().__init__(message)
        self.http_status = http_status
        self.hub_code = code
        self.retry_after_seconds = retry_after_seconds

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        return self.http_status in _TRANSIENT


@dataclass(frozen=True, slots=True)
class Patience:
    """How failures that may pass are met: attempts without a byte between them, and the pause before the
    second one, in seconds; it doubles each time."""

    attempts: int = 6
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 60.0

    def pause(self, failures: int, error: HubError) -> float:
        """Seconds to wait after so many failures; what the server asks for, if it does."""
        asked = error.retry_after_seconds if isinstance(error, Refusal) else None
        wanted = self.first_pause_seconds * 2 ** (failures - 1) if asked is None else asked
        return min(wanted, self.longest_pause_seconds)


class Web:
    """Gets addresses. The headers in `private` go to the host of `home` alone, through redirects too.

    timeout_seconds: of connecting and of waiting for more bytes. certificates: a file of them in place of the
    system's. Raises ConfigError when it cannot be read. May be used by several threads.
    """

    def __init__(
        self,
        home: str,
        private: Mapping[str, str],
        *,
        timeout_seconds: float = 20.0,
        certificates: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.patience = patience or Patience()
        self._home = _origin(home)
        self._private = dict(private)
        self._timeout = timeout_seconds
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=_context(certificates)), _Redirects(self)
        )

    def request(self, url: str) -> urllib.request.Request:
        """A request with the private headers if it goes home. They are not copied by a redirect."""
        headers = {"User-Agent": f"harmonium/{__version__}", "Accept-Encoding": "identity"}
        request = urllib.request.Request(url, headers=headers)
        if _origin(url) == self._home:
            for name, value in self._private.items():
                request.add_unredirected_header(name, value)
        return request

    def get(self, url: str, first: int = 0, end: int | None = None) -> http.client.HTTPResponse:
        """The open answer; the caller closes it. end: ask for the bytes first ... end - 1 alone.

        Raises Refusal for a status other than 200 and 206, Unreachable when nobody answers.
        """
        request = self.request(url)
        if end is not None:
            request.add_header("Range", f"bytes={first}-{end - 1}")
        try:
            answer = self._opener.open(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(url, error) from None
        except urllib.error.URLError as error:
            raise Unreachable(f"{_host(url)} cannot be reached ({_reason(error.reason)})") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{_host(url)} cannot be reached ({_reason(error)})") from None
        assert isinstance(answer, http.client.HTTPResponse), "only http and https are opened"
        return answer

    def json(self, url: str) -> dict[str, Any]:
        """The JSON object at an address. Raises Refusal, Unreachable, HubError when it is none."""
        text = self.text(url, MAX_JSON_BYTES)
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            raise HubError(f"{url}: did not answer with JSON but with {text[:60]!r}") from None
        if not isinstance(table, dict):
            raise HubError(f"{url}: answered with a JSON {type(table).__name__}; expected an object")
        return table

    def text(self, url: str, max_bytes: int, first: int = 0, end: int | None = None) -> bytes:
        """What lies at an address, whole, or a range of it; tried again where that may help.

        Raises what `get` raises; HubError when it is longer.
        """
        for failures in range(1, self.patience.attempts):
            try:
                return self._text(url, max_bytes, first, end)
            except (Refusal, Unreachable) as error:  # noqa: PERF203 - a request costs a thousand times more
                if isinstance(error, Refusal) and not error.is_transient:
                    raise
                time.sleep(self.patience.pause(failures, error))
        return self._text(url, max_bytes, first, end)

    def _text(self, url: str, max_bytes: int, first: int, end: int | None) -> bytes:
        try:
            with self.get(url, first, end) as answer:
                text = answer.read(max_bytes + 1)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{_host(url)} broke off ({_reason(error)})") from None
        if len(text) > max_bytes:
            raise HubError(f"{url}: has more than {max_bytes:,} bytes")
        return text


@cache
def _context(certificates: str | None) -> ssl.SSLContext:
    """Reading the system's certificates takes a tenth of a second, so it is done once."""
    try:
        return ssl.create_default_context(cafile=certificates)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{certificates}: cannot be read as certificates ({error})") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows 301, 302, 303, 307 and 308; never from https to something that is not."""

    def __init__(self, web: Web) -> None:
        self._web = web

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        target = urljoin(req.full_url, newurl)
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("https", "http")
        if urlsplit(target).scheme not in allowed:
            raise HubError(f"{_host(req.full_url)} redirects to {target[:120]}; expected https")
        request = self._web.request(target)
        span = req.get_header("Range")
        if span is not None:
            request.add_header("Range", span)
        return request

    # Python 3.10 does not know 308.
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def _refusal(url: str, error: urllib.error.HTTPError) -> Refusal:
    headers = error.headers
    detail = headers.get("X-Error-Message") or ""
    if not detail:
        try:
            detail = _detail(error.read(_MAX_DETAIL_BYTES))
        except (OSError, http.client.HTTPException, ValueError):
            detail = ""
    after = headers.get("Retry-After") or ""
    message = f"{_host(url)} answered {error.code}" + (
        f": {' '.join(detail.split())[:300]}" if detail else ""
    )
    return Refusal(
        message, error.code, headers.get("X-Error-Code") or "", float(after) if after.isdecimal() else None
    )


def _detail(body: bytes) -> str:
    """What an error's body says, where it is JSON with a message."""
    table = json.loads(body)
    if not isinstance(table, dict):
        return ""
    return next((str(table[key]) for key in ("error", "Message", "message") if table.get(key)), "")


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (
        (error.strerror if isinstance(error, OSError) and error.strerror else "") or str(error) or repr(error)
    )


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2] or url


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
