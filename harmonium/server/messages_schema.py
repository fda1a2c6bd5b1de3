"""The bodies of POST /v1/messages and /v1/messages/count_tokens.

What each field does, and which are refused, says docs/api.md.
Source: Anthropic's Messages API as its Python SDK 2.13 declares it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harmonium.errors import ApiError
from harmonium.server.body import RequestModel
from harmonium.server.config import Limits
from harmonium.server.errors import THREAD_UNSUPPORTED, wrong_value
from harmonium.server.sampling_fields import check_most


class ThinkingOptions(RequestModel):
    """type: enabled (with budget_tokens), adaptive or disabled. display: summarized or omitted."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputConfig(RequestModel):
    """effort: low to max. format: {"type": "json_schema", "schema": {...}}."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class PromptFields(RequestModel):
    """What decides over the prompt: all that count_tokens takes.

    Messages, tools and text blocks stay as they come: messages_history and messages_tools read them.
    """

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    container: str | dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    context_management: dict[str, Any] | None = None
    thread: dict[str, Any] | None = None
    speed: str | None = None


class MessagesRequest(PromptFields):
    """A turn to be written."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    diagnostics: dict[str, Any] | None = None


_REFUSED = {
    "container": "nothing is run here",
    "mcp_servers": "this server calls no other; offer their tools as tools of your own",
}


def check_request(body: PromptFields, limits: Limits) -> None:
    """Raises ApiError for a field whose effect the client would miss, and for more than the limits allow."""
    for name, reason in _REFUSED.items():
        if getattr(body, name):
            raise ApiError(f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
    if body.thread:
        raise ApiError(
            "thread is not supported: no conversation is kept here; send all of its messages",
            param="thread",
            code=THREAD_UNSUPPORTED,
        )
    check_most("messages", len(body.messages), limits.messages, least=1, unit="messages")
    check_most("tools", len(body.tools or ()), limits.tools)
    if isinstance(body, MessagesRequest):
        _check_turn(body, limits)


def _check_turn(body: MessagesRequest, limits: Limits) -> None:
    if body.max_tokens < 1:
        raise wrong_value("max_tokens", body.max_tokens, "at least 1")
    stops = body.stop_sequences or ()
    check_most("stop_sequences", len(stops), limits.stop)
    for index, text in enumerate(stops):
        check_most(f"stop_sequences[{index}]", len(text), limits.text_chars, least=1, unit="characters")
    check_most("metadata", len(body.metadata or ()), limits.metadata)


def without_effect(body: PromptFields, uses_grammar: bool) -> Iterator[str]:
    """Known fields that this request sets and that change nothing here; docs/api.md gives the reasons."""
    if body.context_management:
        yield "context_management"
    if body.speed not in (None, "standard"):
        yield "speed"
    if body.thinking is not None and body.thinking.budget_tokens is not None and not uses_grammar:
        yield "thinking.budget_tokens"
    if isinstance(body, MessagesRequest):
        if body.service_tier not in (None, "auto", "standard_only"):
            yield "service_tier"
        if body.inference_geo is not None:
            yield "inference_geo"
        if body.diagnostics is not None:
            yield "diagnostics"
