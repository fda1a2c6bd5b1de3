"""`encrypted_content`: reasoning that a client keeps for us and gives back, and that nobody but us can make.

    seal = Seal(key)
    text = seal.close(SealedReasoning("I think", token_ids))
    seal.open(text)          # SealedReasoning, or None for a seal of another key or an altered one

The content is authenticated (HMAC-SHA-256 under a key that each store makes for itself) and compressed, not
encrypted: the same reasoning stands readable in the item's `content`, so there is nothing to hide, and a
cipher would be a dependency that protects nothing. What the seal protects is the token ids: they are put
into the prompt as they are, special tokens included, so they must be ours.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import zlib
from dataclasses import dataclass

KEY_BYTES = 32
_VERSION = b"H1"
_TAG_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class SealedReasoning:
    """Reasoning as the model wrote it. token_ids: the whole message, None where it was malformed."""

    text: str
    token_ids: tuple[int, ...] | None = None


def new_key() -> bytes:
    """A key that nobody can guess."""
    return secrets.token_bytes(KEY_BYTES)


class Seal:
    """Closes and opens seals under one key."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"
        self._key = key

    def close(self, reasoning: SealedReasoning) -> str:
        """Text of URL-safe characters that holds the reasoning and proves that we made it."""
        payload = json.dumps([reasoning.text, reasoning.token_ids], ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        body = _VERSION + zlib.compress(payload)
        return base64.urlsafe_b64encode(self._tag(body) + body).decode("ascii")

    def open(self, text: str) -> SealedReasoning | None:
        """What was sealed; None unless it was sealed with this key.

        Nothing of the text is decompressed or parsed before its tag is found to be right.
        """
        try:
            data = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error):
            return None
        tag, body = data[:_TAG_BYTES], data[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(body)) or not body.startswith(_VERSION):
            return None
        content, token_ids = json.loads(
            zlib.decompress(body[len(_VERSION) :]).decode("utf-8", "surrogatepass")
        )
        return SealedReasoning(content, None if token_ids is None else tuple(token_ids))

    def _tag(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")
