"""The Response object: what /v1/responses answers, and what its first and last events carry.

All 31 keys that the Open Responses specification requires are always there, null where nothing is to be
said; `warnings` and `diagnostics` are ours. One function builds it for every status, so that a streamed
response and a fetched one cannot differ.

Source: openresponses/openresponses:public/openapi/openapi.json (ResponseResource), openai.types.responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from harmonium.chat_events import Usage
from harmonium.server.responses_schema import ResponsesRequest, TextFormat
from harmonium.server.responses_tools import ToolTable

ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResponseFacts:
    """What is known of a response before its first token. created_at: seconds since 1970, UTC.

    effort: as the prompt says it. warnings: what was left out of the request, for people to read.
    """

    response_id: str
    created_at: int
    model: str
    effort: str
    request: ResponsesRequest
    tools: ToolTable = field(default_factory=ToolTable)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a response stands. completed_at: seconds since 1970; None unless it is completed."""

    status: ResponseStatus
    output: tuple[Json, ...] = ()
    usage: Usage | None = None
    error: Json | None = None
    incomplete_reason: str | None = None
    completed_at: int | None = None
    diagnostics: tuple[Json, ...] = ()


def response_object(facts: ResponseFacts, outcome: Outcome) -> Json:
    """The object of a response that stands so."""
    reason = outcome.incomplete_reason
    return {
        "id": facts.response_id,
        "object": "response",
        "created_at": facts.created_at,
        "status": outcome.status,
        "completed_at": outcome.completed_at,
        "error": outcome.error,
        "incomplete_details": None if reason is None else {"reason": reason},
        "model": facts.model,
        "output": list(outcome.output),
        "usage": None if outcome.usage is None else usage_object(outcome.usage),
        **_echo(facts),
        "warnings": list(facts.warnings),
        "diagnostics": list(outcome.diagnostics),
    }


def _echo(facts: ResponseFacts) -> Json:
    """The request's settings as they were used: defaults stand where it gave none."""
    request = facts.request
    choice = request.tool_choice
    return {
        "previous_response_id": request.previous_response_id,
        "instructions": request.instructions,
        "tools": list(facts.tools.echo),
        "tool_choice": "auto" if choice is None else choice,
        "parallel_tool_calls": bool(request.parallel_tool_calls),
        "max_tool_calls": request.max_tool_calls,
        "text": _text(request),
        "reasoning": _reasoning(facts),
        "truncation": request.truncation or "disabled",
        "max_output_tokens": request.max_output_tokens,
        "temperature": _number(request.temperature, 1.0),
        "top_p": _number(request.top_p, 1.0),
        "top_logprobs": request.top_logprobs or 0,
        "presence_penalty": _number(request.presence_penalty, 0.0),
        "frequency_penalty": _number(request.frequency_penalty, 0.0),
        "store": request.is_stored,
        "background": bool(request.background),
        "service_tier": "default",
        "metadata": dict(request.metadata or {}),
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }


def _number(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _reasoning(facts: ResponseFacts) -> Json:
    asked = facts.request.reasoning
    effort = facts.effort if asked is None or asked.effort is None else asked.effort
    return {"effort": effort, "summary": None}


def _text(request: ResponsesRequest) -> Json:
    verbosity = request.text.verbosity if request.text is not None else None
    return {"format": format_object(request.format), "verbosity": verbosity or "medium"}


def format_object(form: TextFormat) -> Json:
    """A format as the API shows it."""
    match form.type:
        case "json_schema":
            return {
                "type": "json_schema",
                "name": form.name,
                "description": form.description,
                "schema": form.schema_,
                "strict": bool(form.strict),
            }
        case "grammar":
            return {"type": "grammar", "syntax": form.syntax, "definition": form.definition}
    return {"type": form.type}


def usage_object(usage: Usage) -> Json:
    """Tokens of a turn. cache_write_tokens: 0, for nothing is billed by it."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
