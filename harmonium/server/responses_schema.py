"""The body of POST /v1/responses, checked field by field.

Every field is used, echoed, or refused by an error that names it (docs/api.md has the table); fields that
nobody here knows are named in a header of the answer. Items of `input` are read in responses_items.py, tools
in responses_tools.py.

Source: the request types of the OpenAI SDK (openai.types.responses), and what Codex sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from harmonium.errors import ApiError
from harmonium.server.body import RequestModel
from harmonium.server.config import Limits

MAX_INPUT_ITEMS = 10_000

INCLUDABLE = (
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    # These belong to tools that this server does not run: nothing to include, nothing to refuse.
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)

_UNSUPPORTED = {
    "prompt": "prompt templates live on OpenAI's servers; send instructions and input",
    "conversation": "conversations are not kept here; use previous_response_id",
    "moderation": "there is no moderation model here",
    "context_management": "nothing is compacted here; use truncation 'auto'",
    "chat_template_kwargs": "there is no chat template here; use reasoning.effort and instructions",
    "chat_template": "there is no chat template here; the prompt is Harmony's",
}


_HINTS = (
    "client_metadata",
    "prompt_cache_retention",
    "prompt_cache_options",
    "access_programs",
    "background_options",
)


class Reasoning(RequestModel):
    """effort: see efforts.py. summary: accepted; the raw reasoning is in the items, none is made.

    max_tokens: ours: reasoning is closed when it has so many.
    """

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    max_tokens: int | None = Field(default=None, ge=0, le=1 << 30)


class TextFormat(RequestModel):
    """What the final answer must look like. `grammar` is ours, the others OpenAI's."""

    type: Literal["text", "json_object", "json_schema", "grammar"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class TextSettings(RequestModel):
    """format: of the final answer. verbosity: accepted; the models were not trained with it."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(RequestModel):
    """One request; the meaning of each field stands in docs/api.md. None is the API's default."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(default=None, ge=1, le=1 << 30)
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=1 << 30)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    # Beyond OpenAI's fields: as in Chat Completions.
    use_grammar: bool | None = None
    cache_salt: str | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    top_k: int | None = Field(default=None, ge=0, le=1 << 30)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    # Hints to somebody else's machines: no answer depends on them, and nothing is done with them.
    client_metadata: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    stream_options: Any = None
    access_programs: Any = None
    background_options: Any = None
    # Refused unless null: _UNSUPPORTED says why.
    prompt: Any = None
    conversation: Any = None
    moderation: Any = None
    context_management: Any = None
    chat_template_kwargs: Any = None
    chat_template: Any = None

    @property
    def format(self) -> TextFormat:
        """The final answer's; plain text where the request names none."""
        return (self.text.format if self.text is not None else None) or TextFormat()

    @property
    def is_stored(self) -> bool:
        """Whether the response can be fetched and continued later; the default is yes."""
        return self.store is not False

    @property
    def wants_sealed_reasoning(self) -> bool:
        """Whether reasoning items are to carry `encrypted_content`."""
        return "reasoning.encrypted_content" in (self.include or ())

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token of the visible text; None: no log-probabilities."""
        if self.top_logprobs:
            return self.top_logprobs
        return 0 if "message.output_text.logprobs" in (self.include or ()) else None


def check_request(request: ResponsesRequest, limits: Limits) -> None:
    """What the types alone cannot say. Raises ApiError that names field, value and limit."""
    for field, reason in _UNSUPPORTED.items():
        if getattr(request, field) is not None:
            raise ApiError(f"{field} is not supported: {reason}", param=field, code="unsupported_parameter")
    if request.input is None and request.previous_response_id is None and not request.instructions:
        raise ApiError(
            "input is missing; expected text or a list of items",
            param="input",
            code="missing_required_parameter",
        )
    if request.background and not request.is_stored:
        raise ApiError(
            "background is true and store is false; a result that is fetched later must be stored",
            param="background",
        )
    items = request.input if isinstance(request.input, list) else []
    _check_count("input", len(items), MAX_INPUT_ITEMS)
    _check_count("tools", len(request.tools or ()), limits.tools)
    _check_metadata(request, limits)
    _check_format(request.format)
    for index, name in enumerate(request.include or ()):
        if name not in INCLUDABLE:
            raise ApiError(
                f"include[{index}] is {name[:80]!r}; expected one of {', '.join(INCLUDABLE)}",
                param=f"include[{index}]",
            )


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise ApiError(f"{name} has {count:,} entries; the limit is {most:,}", param=name)


def _check_metadata(request: ResponsesRequest, limits: Limits) -> None:
    entries = request.metadata or {}
    _check_count("metadata", len(entries), limits.metadata)
    for key, text in entries.items():
        if len(key) > 64 or len(text) > limits.text_chars:
            raise ApiError(
                f"metadata[{key[:64]!r}] has {len(key):,} and {len(text):,} characters; keys hold 64 at "
                f"most, values {limits.text_chars:,}",
                param="metadata",
            )


def _check_format(form: TextFormat) -> None:
    needed = {"json_schema": ("name", "schema"), "grammar": ("syntax", "definition")}
    for field in needed.get(form.type, ()):
        if getattr(form, "schema_" if field == "schema" else field) is None:
            raise ApiError(
                f"text.format.{field} is missing; a format of type {form.type} needs it",
                param=f"text.format.{field}",
            )
    name = form.name
    if name is not None and not (0 < len(name) <= 64 and name.replace("-", "_").replace("_", "a").isalnum()):
        raise ApiError(
            f"text.format.name is {name[:80]!r}; expected 1 to 64 letters, digits, _ or -",
            param="text.format.name",
        )


def without_effect(request: ResponsesRequest) -> Iterator[str]:
    """Known fields that this request sets and that change nothing here; docs/api.md gives the reasons."""
    if request.service_tier not in (None, "auto", "default"):
        yield "service_tier"
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        yield "text.verbosity"
    if request.reasoning is not None:
        for field in ("summary", "generate_summary"):
            if getattr(request.reasoning, field) not in (None, "none"):
                yield f"reasoning.{field}"
    for field in _HINTS:
        if getattr(request, field) is not None:
            yield field
