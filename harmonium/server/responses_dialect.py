"""How events are named on the wire: as OpenAI's SDKs and Codex read them, or as Open Responses writes them.

The two differ in the names of raw reasoning, in the `error` event, and in the `[DONE]` that ends a stream.
A request chooses with the header `x-harmonium-events: open-responses`; OpenAI's names are the default.

Source: openresponses/openresponses:public/openapi/openapi.json; openai.types.responses.
"""

from __future__ import annotations

from typing import Any, Literal

from harmonium.errors import ApiError
from harmonium.server.sse import DONE, event

DIALECT_HEADER = "x-harmonium-events"

Dialect = Literal["openai", "open-responses"]

_OPEN_RESPONSES_NAMES = {
    "response.reasoning_text.delta": "response.reasoning.delta",
    "response.reasoning_text.done": "response.reasoning.done",
}


def read_dialect(value: str | None) -> Dialect:
    """The dialect that a header's value asks for. Raises ApiError for one that nobody knows."""
    if value in (None, "", "openai"):
        return "openai"
    if value == "open-responses":
        return "open-responses"
    raise ApiError(f"{DIALECT_HEADER} is {str(value)[:40]!r}; expected openai or open-responses")


def encode_event(written: dict[str, Any], dialect: Dialect) -> bytes:
    """One server-sent event."""
    name = str(written["type"])
    if dialect == "open-responses":
        name = _OPEN_RESPONSES_NAMES.get(name, name)
        written = {**written, "type": name}
    return event(written, name)


def last_bytes(dialect: Dialect) -> bytes:
    """What ends a stream after its terminal event."""
    return DONE if dialect == "open-responses" else b""


def error_event(message: str, code: str | None, sequence_number: int, dialect: Dialect) -> bytes:
    """The event for a stream that fails where no response.failed can be written any more."""
    fields = {"code": code, "message": message, "param": None}
    if dialect == "open-responses":
        fields = {"error": {"type": "server_error", **fields}}  # type: ignore[dict-item]
    return event({"type": "error", "sequence_number": sequence_number, **fields}, "error")
