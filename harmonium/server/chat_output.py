"""Chat events -> the JSON of a chat completion, in one piece or as chunks of a stream.

Both are made from the same events by the same rules: what the chunks of a choice add up to is the message
that the answer in one piece holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harmonium.chat_events import (
    ChatEvent,
    ChatResult,
    ContentDelta,
    Finish,
    MessageStarted,
    ReasoningDelta,
    TextItem,
    ToolArgumentsDelta,
    ToolCallItem,
    ToolCallStarted,
    Usage,
)
from harmonium.harmony.parse import Diagnostic
from harmonium.server.logprobs import logprobs_json

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What a request wants to see.

    reasoning_fields: names under which reasoning is given; (): it is left out. custom_tools: calls of these
    carry text. has_tools: the request declared tools; calls of others are then shown too, for the client can
    answer them with an error. Without tools nobody expects a call: it is told as a diagnostic.
    """

    reasoning_fields: tuple[str, ...] = ("reasoning_content", "reasoning")
    has_logprobs: bool = False
    has_reasoning_logprobs: bool = False
    has_token_ids: bool = False
    has_tools: bool = False
    custom_tools: frozenset[str] = frozenset()

    def shows_call(self, call: ToolCallStarted | ToolCallItem) -> bool:
        """Whether this call is one of `tool_calls`."""
        return call.is_declared or self.has_tools


def choice_json(index: int, result: ChatResult, options: OutputOptions) -> Json:
    """A choice of an answer in one piece."""
    choice: Json = {
        "index": index,
        "message": _message_json(result, options),
        "logprobs": _result_logprobs(result, options),
        "finish_reason": result.finish_reason,
    }
    diagnostics = [_diagnostic_json(diagnostic) for diagnostic in result.diagnostics]
    if diagnostics:
        choice["diagnostics"] = diagnostics
    if options.has_token_ids:
        choice["token_ids"] = list(result.token_ids)
    return choice


def _message_json(result: ChatResult, options: OutputOptions) -> Json:
    has_content = any(isinstance(item, TextItem) and item.kind == "content" for item in result.items)
    message: Json = {
        "role": "assistant",
        "content": result.content if has_content else None,
        "refusal": None,
        "annotations": [],
    }
    if result.reasoning:
        message.update(dict.fromkeys(options.reasoning_fields, result.reasoning))
    calls = [call for call in result.tool_calls if options.shows_call(call)]
    if calls:
        message["tool_calls"] = [_call_json(call, options) for call in calls]
    return message


def _call_json(call: ToolCallItem, options: OutputOptions) -> Json:
    if call.name in options.custom_tools:
        return {"id": call.call_id, "type": "custom", "custom": {"name": call.name, "input": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _result_logprobs(result: ChatResult, options: OutputOptions) -> Json | None:
    if not options.has_logprobs:
        return None
    found: Json = {"content": [], "refusal": None}
    if options.has_reasoning_logprobs:
        found["reasoning"] = []
    for item in result.items:
        if isinstance(item, TextItem):
            name = "content" if item.kind == "content" else "reasoning"
            if name in found:
                found[name] += logprobs_json(item.tokens)
    return found


def _diagnostic_json(diagnostic: Diagnostic) -> Json:
    return {"code": diagnostic.code, "text": diagnostic.text}


def usage_json(usages: list[Usage]) -> Json:
    """Usage of all choices: their prompt is one, their answers add up."""
    prompt = usages[0].prompt_tokens
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)},
    }


class ChoiceStream:
    """The chunks of one choice: each a value for `choices[0]`, made from the events as they come."""

    def __init__(self, index: int, options: OutputOptions) -> None:
        self._index = index
        self._options = options
        self._call_numbers: dict[int, int] = {}
        self._custom: set[int] = set()
        self._diagnostics: list[Json] = []
        self.usage = Usage()
        """So far; whole after the last event. Text tokens only, until then."""

    def first(self, prompt_tokens: int) -> Json:
        """The chunk that says who speaks."""
        self.usage = Usage(prompt_tokens)
        return self._choice({"role": "assistant"})

    def push(self, event: ChatEvent) -> Iterator[Json]:
        """The chunks of this event: none or one."""
        match event:
            case ReasoningDelta():
                yield from self._reasoning(event)
            case ContentDelta():
                self._count(len(event.tokens))
                logprobs = self._logprobs("content", event) if self._options.has_logprobs else None
                yield self._choice({"content": event.separator + event.text}, logprobs)
            case MessageStarted(kind="content"):
                yield self._choice({"content": ""})
            case ToolCallStarted():
                if self._options.shows_call(event):
                    yield self._choice({"tool_calls": [self._start_call(event)]})
            case ToolArgumentsDelta():
                if event.index in self._call_numbers:
                    yield self._choice({"tool_calls": [self._arguments(event)]})
            case Diagnostic():
                self._diagnostics.append(_diagnostic_json(event))
            case Finish():
                self.usage = event.usage
                yield self._last(event)

    def _reasoning(self, event: ReasoningDelta) -> Iterator[Json]:
        self._count(len(event.tokens), is_reasoning=True)
        text = event.separator + event.text
        logprobs = None
        if self._options.has_logprobs and self._options.has_reasoning_logprobs:
            logprobs = self._logprobs("reasoning", event)
        delta = dict.fromkeys(self._options.reasoning_fields, text)
        if delta or logprobs is not None:
            yield self._choice(delta, logprobs)

    def _logprobs(self, name: str, event: ReasoningDelta | ContentDelta) -> Json:
        found: Json = {"content": [], "refusal": None}
        found[name] = logprobs_json(event.tokens)
        return found

    def _start_call(self, event: ToolCallStarted) -> Json:
        number = self._call_numbers[event.index] = len(self._call_numbers)
        call: Json = {"index": number, "id": event.call_id}
        if event.name in self._options.custom_tools:
            self._custom.add(event.index)
            return {**call, "type": "custom", "custom": {"name": event.name, "input": ""}}
        return {**call, "type": "function", "function": {"name": event.name, "arguments": ""}}

    def _arguments(self, event: ToolArgumentsDelta) -> Json:
        number = self._call_numbers[event.index]
        if event.index in self._custom:
            return {"index": number, "custom": {"input": event.text}}
        return {"index": number, "function": {"arguments": event.text}}

    def _last(self, event: Finish) -> Json:
        choice = self._choice({})
        choice["finish_reason"] = event.finish_reason
        if self._diagnostics:
            choice["diagnostics"] = self._diagnostics
        if self._options.has_token_ids:
            choice["token_ids"] = list(event.token_ids)
        return choice

    def _choice(self, delta: Json, logprobs: Json | None = None) -> Json:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _count(self, tokens: int, is_reasoning: bool = False) -> None:
        old = self.usage
        reasoning = old.reasoning_tokens + (tokens if is_reasoning else 0)
        self.usage = Usage(old.prompt_tokens, old.completion_tokens + tokens, reasoning, old.cached_tokens)
