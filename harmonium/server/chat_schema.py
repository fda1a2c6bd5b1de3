"""The body of POST /v1/chat/completions. What each field does, and which are refused, says docs/api.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from harmonium.errors import ApiError
from harmonium.harmony.chat_history import REASONING_FIELDS
from harmonium.server.body import RequestModel
from harmonium.server.sampling_fields import SamplingFields


class ReasoningOptions(RequestModel):
    """The extension `reasoning`: effort as in `reasoning_effort`; max_tokens limits the reasoning."""

    effort: str | None = None
    max_tokens: int | None = None


class ChatCompletionRequest(SamplingFields):
    """Messages and tools stay as they come: harmony reads them, and names what it cannot read."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning: ReasoningOptions | None = None
    include_reasoning: bool | None = None
    use_grammar: bool | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    prediction: dict[str, Any] | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    safety_identifier: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    chat_template: str | None = None
    documents: list[Any] | None = None
    moderation: Any = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = Field(default=None)


_REFUSED = {
    "audio": "the models write text only",
    "web_search_options": "this server never goes to the web; offer a tool of your own",
    "functions": "it was replaced by tools",
    "function_call": "it was replaced by tool_choice",
    "chat_template": "the prompt is made by the Harmony format, not by a template",
    "documents": "put them into a message",
    "moderation": "there is no moderation model here",
}


def check_supported(request: ChatCompletionRequest) -> None:
    """Raises ApiError for a field whose effect the client would miss."""
    for name, reason in _REFUSED.items():
        if getattr(request, name):
            raise unsupported(name, reason)
    if request.modalities not in (None, ["text"]):
        raise unsupported("modalities", "the models write text only")
    if request.continue_final_message:
        raise unsupported("continue_final_message", "a turn of the model always begins with its header")
    if request.add_generation_prompt is False:
        raise unsupported("add_generation_prompt", "the model always writes the next message")


def unsupported(name: str, reason: str) -> ApiError:
    """400 for something that a model, or this server, cannot do."""
    return ApiError(f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")


_MESSAGE_FIELDS = frozenset(
    ["role", "content", "tool_calls", "tool_call_id", "refusal", "annotations", "audio", "function_call"]
) | frozenset(REASONING_FIELDS)


def without_effect(request: ChatCompletionRequest) -> Iterator[str]:
    """Known fields that this request sets and that change nothing here; docs/api.md gives the reasons."""
    if request.store:
        yield "store"
    if request.prediction is not None:
        yield "prediction"
    if request.verbosity not in (None, "medium"):
        yield "verbosity"
    if request.service_tier not in (None, "auto", "default"):
        yield "service_tier"
    for name in ("prompt_cache_retention", "prompt_cache_options"):
        if getattr(request, name) is not None:
            yield name
    if request.ignore_eos:
        yield "ignore_eos"
    names = {name for message in request.messages for name in message if name not in _MESSAGE_FIELDS}
    yield from (f"messages[].{name}" for name in sorted(names))
