"""Chat events -> a message of Anthropic's API, in one piece or as the events of a stream.

Both are made from the same turn by the same rules: what a client adds up from the stream is the message that
the answer in one piece holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harmonium.chat_events import (
    ChatEvent,
    ChatFinishReason,
    ChatResult,
    ContentDelta,
    Finish,
    MessageEnded,
    ReasoningDelta,
    TextItem,
    ToolArgumentsDelta,
    ToolCallEnded,
    ToolCallItem,
    ToolCallStarted,
    TurnStarted,
    Usage,
)
from harmonium.harmony.messages import Message
from harmonium.harmony.parse import Diagnostic
from harmonium.server.messages_arguments import ObjectText, object_of
from harmonium.server.messages_input import ThinkingPlan
from harmonium.server.responses_seal import Seal, SealedReasoning

Json = dict[str, Any]

PING: Mapping[str, Any] = {"type": "ping"}


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """What is known of an answer before it begins.

    has_tools: the request declared tools; calls of others are then shown too, for the client can answer them
    with an error. Without tools nobody expects a call.
    """

    message_id: str
    model: str
    max_tokens: int
    context_length: int
    thinking: ThinkingPlan
    has_tools: bool
    seal: Seal

    def shows_call(self, call: ToolCallStarted | ToolCallItem) -> bool:
        """Whether this call is a tool_use block."""
        return call.is_declared or self.has_tools

    def message(self, content: list[Json], usage: Usage, warnings: tuple[str, ...]) -> Json:
        """A message that has not ended."""
        message: Json = {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**usage_json(usage), "service_tier": "standard"},
        }
        if warnings:
            message["warnings"] = list(warnings)
        return message

    def stop(self, reason: ChatFinishReason, usage: Usage, stop_text: str | None, has_call: bool) -> Json:
        """Why the turn ended. has_call: it holds a whole call that is shown."""
        if reason == "length":
            is_full = usage.total_tokens >= self.context_length and usage.completion_tokens < self.max_tokens
            name = "model_context_window_exceeded" if is_full else "max_tokens"
        elif has_call:
            name = "tool_use"
        else:
            name = "end_turn" if stop_text is None else "stop_sequence"
        return {"stop_reason": name, "stop_sequence": stop_text if name == "stop_sequence" else None}

    def signature(self, text: str, message: Message) -> str:
        """Proves that we made this thinking, and holds it with its tokens."""
        return self.seal.close(SealedReasoning(text, message.token_ids))


def usage_json(usage: Usage) -> Json:
    """input_tokens are those of the prompt that were computed; the rest was read from the prefix cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def tool_use_id(call_id: str) -> str:
    """The id of a call as this API spells it."""
    return f"toolu_{call_id.removeprefix('call_')}"


def message_json(facts: AnswerFacts, result: ChatResult) -> Json:
    """An answer in one piece."""
    content = [block for item in result.items if (block := _block(facts, item)) is not None]
    has_call = any(
        isinstance(item, ToolCallItem) and item.is_complete and facts.shows_call(item)
        for item in result.items
    )
    message = facts.message(content, result.usage, result.warnings)
    message |= facts.stop(result.finish_reason, result.usage, result.stop_text, has_call)
    if result.diagnostics:
        message["harmony_diagnostics"] = [_diagnostic_json(each) for each in result.diagnostics]
    return message


def _block(facts: AnswerFacts, item: TextItem | ToolCallItem) -> Json | None:
    if isinstance(item, ToolCallItem):
        if not facts.shows_call(item):
            return None
        arguments = ObjectText()
        sent = arguments.push(item.arguments) + arguments.finish(item.is_complete)
        return {**_call_block(item.call_id, item.name), "input": object_of(sent)}
    if not item.text:
        return None
    if item.kind == "content":
        return {"type": "text", "text": item.text}
    if not facts.thinking.is_shown:
        return None
    return {
        "type": "thinking",
        "thinking": "" if facts.thinking.is_omitted else item.text,
        "signature": facts.signature(item.text, item.message),
    }


def _call_block(call_id: str, name: str) -> Json:
    return {"type": "tool_use", "id": tool_use_id(call_id), "name": name, "input": {}}


def _diagnostic_json(diagnostic: Diagnostic) -> Json:
    return {"code": diagnostic.code, "text": diagnostic.text}


class MessageEvents:
    """The events of one stream, in Anthropic's order, made from chat events as they come."""

    def __init__(self, facts: AnswerFacts) -> None:
        self._facts = facts
        self._num_blocks = 0
        self._open: str | None = None
        self._thinking: list[str] = []
        self._arguments: ObjectText | None = None
        self._has_call = False
        self._diagnostics: list[Json] = []

    def push(self, event: ChatEvent) -> Iterator[Json]:
        """The events that this one causes."""
        match event:
            case TurnStarted():
                message = self._facts.message([], Usage(event.prompt_tokens), event.warnings)
                yield {"type": "message_start", "message": message}
                yield dict(PING)
            case ReasoningDelta() if self._facts.thinking.is_shown:
                yield from self._think(event.text)
            case ContentDelta():
                if self._open is None:
                    yield self._start({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": event.text})
            case ToolCallStarted() if self._facts.shows_call(event):
                self._arguments = ObjectText()
                yield self._start(_call_block(event.call_id, event.name))
            case ToolArgumentsDelta() if self._arguments is not None:
                yield from self._argue(self._arguments.push(event.text))
            case MessageEnded() | ToolCallEnded():
                yield from self._end(event)
            case Diagnostic():
                self._diagnostics.append(_diagnostic_json(event))
            case Finish():
                yield from self._finish(event)

    def _think(self, text: str) -> Iterator[Json]:
        if self._open is None:
            yield self._start({"type": "thinking", "thinking": "", "signature": ""})
        self._thinking.append(text)
        if not self._facts.thinking.is_omitted:
            yield self._delta({"type": "thinking_delta", "thinking": text})

    def _argue(self, sent: str) -> Iterator[Json]:
        if sent:
            yield self._delta({"type": "input_json_delta", "partial_json": sent})

    def _end(self, event: MessageEnded | ToolCallEnded) -> Iterator[Json]:
        if self._open is None:  # nothing of it was shown
            return
        if self._open == "thinking":
            signature = self._facts.signature("".join(self._thinking), event.message)
            yield self._delta({"type": "signature_delta", "signature": signature})
            self._thinking.clear()
        elif self._arguments is not None:
            yield from self._argue(self._arguments.finish(event.is_complete))
            self._has_call |= event.is_complete
            self._arguments = None
        yield {"type": "content_block_stop", "index": self._num_blocks - 1}
        self._open = None

    def _start(self, block: Json) -> Json:
        assert self._open is None, f"a {block['type']} begins in a {self._open}"
        self._open = block["type"]
        self._num_blocks += 1
        return {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _finish(self, event: Finish) -> Iterator[Json]:
        stop = self._facts.stop(event.finish_reason, event.usage, event.stop_text, self._has_call)
        last: Json = {"type": "message_delta", "delta": stop, "usage": usage_json(event.usage)}
        if self._diagnostics:
            last["harmony_diagnostics"] = self._diagnostics
        yield last
        yield {"type": "message_stop"}
