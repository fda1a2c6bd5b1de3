"""API keys: where a request carries one, and a comparison that tells nothing by its time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers


class KeyRing:
    """The keys that open the server; no key at all means that it is open."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def accepts(self, key: str | None) -> bool:
        """Whether this key is one of ours. Takes the same time for every wrong key of a length."""
        if not self._digests:
            return True
        given = _digest(key or "")
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return key is not None and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def key_of(headers: Headers) -> str | None:
    """The key that a request carries: `Authorization: Bearer KEY`, or x-api-key, or api-key."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return headers.get("x-api-key") or headers.get("api-key")
