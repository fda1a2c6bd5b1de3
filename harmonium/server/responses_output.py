"""Output items while they grow: each class here is one item, from `open` over deltas to `close`.

Each call returns the events that it causes, in the API's order, without sequence numbers:

    output_item.added  content_part.added  ...delta*  ...done  content_part.done  output_item.done

`item(status)` is the item as it stands; the one that `close` puts into output_item.done is the one of the
final object.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

from harmonium.engine.protocol import Token
from harmonium.harmony.messages import Message
from harmonium.server.logprobs import logprobs_json
from harmonium.server.responses_seal import Seal, SealedReasoning
from harmonium.server.responses_tools import ToolEntry

Json = dict[str, Any]


class OutputItem(Protocol):
    """What the writer of events knows of an item. text: all of its deltas so far."""

    text: str

    def open(self) -> list[Json]: ...

    def delta(self, text: str, tokens: tuple[Token, ...]) -> list[Json]: ...

    def close(self, message: Message, is_complete: bool) -> list[Json]: ...

    def item(self, status: str) -> Json: ...


def item_id(prefix: str, response_id: str, index: int) -> str:
    """The id of a response's item: the same for the same place in the same response."""
    digest = hashlib.sha256(f"{response_id}/{index}".encode()).hexdigest()
    return f"{prefix}_{digest[:48]}"


class _Item:
    """What all items share: their place, their text, their first and last events."""

    prefix = ""

    def __init__(self, response_id: str, index: int) -> None:
        self.id = item_id(self.prefix, response_id, index)
        self.text = ""
        self._index = index

    def item(self, status: str) -> Json:
        raise NotImplementedError

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": f"response.{kind}", "output_index": self._index, **fields}

    def _of_item(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, item_id=self.id, **fields)

    def _of_part(self, kind: str, **fields: Any) -> Json:
        return self._of_item(kind, content_index=0, **fields)

    def _added(self) -> Json:
        return self._event("output_item.added", item=self.item("in_progress"))

    def _done(self, is_complete: bool) -> Json:
        return self._event("output_item.done", item=self.item("completed" if is_complete else "incomplete"))


class ReasoningItem(_Item):
    """Reasoning, raw as the model wrote it, in one part. seal: given when encrypted_content is asked for."""

    prefix = "rs"

    def __init__(self, response_id: str, index: int, seal: Seal | None) -> None:
        super().__init__(response_id, index)
        self._seal = seal
        self._sealed: str | None = None
        self._is_open = False

    def item(self, status: str) -> Json:
        content = [self._part()] if self._is_open else []
        return {
            "id": self.id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": content,
            "encrypted_content": self._sealed,
        }

    def _part(self) -> Json:
        return {"type": "reasoning_text", "text": self.text}

    def open(self) -> list[Json]:
        added = self._added()
        self._is_open = True
        return [added, self._of_part("content_part.added", part=self._part())]

    def delta(self, text: str, tokens: tuple[Token, ...]) -> list[Json]:
        self.text += text
        return [self._of_part("reasoning_text.delta", delta=text)]

    def close(self, message: Message, is_complete: bool) -> list[Json]:
        if self._seal is not None:
            self._sealed = self._seal.close(SealedReasoning(self.text, message.token_ids))
        return [
            self._of_part("reasoning_text.done", text=self.text),
            self._of_part("content_part.done", part=self._part()),
            self._done(is_complete),
        ]


class MessageItem(_Item):
    """Text for the user. phase: commentary before a call, or final_answer."""

    prefix = "msg"

    def __init__(self, response_id: str, index: int, channel: str | None, has_logprobs: bool) -> None:
        super().__init__(response_id, index)
        self._phase = "final_answer" if channel == "final" else "commentary"
        self._has_logprobs = has_logprobs
        self._logprobs: list[Json] = []
        self._is_open = False

    def item(self, status: str) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "phase": self._phase,
            "content": [self._part()] if self._is_open else [],
        }

    def _part(self) -> Json:
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": list(self._logprobs),
        }

    def open(self) -> list[Json]:
        added = self._added()
        self._is_open = True
        return [added, self._of_part("content_part.added", part=self._part())]

    def delta(self, text: str, tokens: tuple[Token, ...]) -> list[Json]:
        self.text += text
        logprobs = logprobs_json(tokens) if self._has_logprobs else []
        self._logprobs += logprobs
        return [self._of_part("output_text.delta", delta=text, logprobs=logprobs)]

    def close(self, message: Message, is_complete: bool) -> list[Json]:
        return [
            self._of_part("output_text.done", text=self.text, logprobs=list(self._logprobs)),
            self._of_part("content_part.done", part=self._part()),
            self._done(is_complete),
        ]


class FunctionCallItem(_Item):
    """A call of a function. Its arguments are the model's text, JSON or not."""

    prefix = "fc"

    def __init__(self, response_id: str, index: int, call_id: str, name: str, tool: ToolEntry | None) -> None:
        super().__init__(response_id, index)
        self._call_id = call_id
        self._name = tool.name if tool is not None else name
        self._namespace = tool.namespace if tool is not None else None
        self._is_declared = tool is not None

    def item(self, status: str) -> Json:
        item: Json = {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
        }
        return item if self._namespace is None else {**item, "namespace": self._namespace}

    def open(self) -> list[Json]:
        return [self._added()]

    def delta(self, text: str, tokens: tuple[Token, ...]) -> list[Json]:
        self.text += text
        return [self._of_item("function_call_arguments.delta", delta=text)]

    def close(self, message: Message, is_complete: bool) -> list[Json]:
        # A call of a tool that nobody offered is shown, and marked as one not to be carried out.
        return [
            self._of_item("function_call_arguments.done", arguments=self.text, name=self._name),
            self._done(is_complete and self._is_declared),
        ]


class CustomCallItem(_Item):
    """A call of a custom tool: free text.

    A model that was not held to a grammar may wrap the text as JSON, {"input": "..."} or a quoted string;
    text that begins like that is kept back until the end and unwrapped if it is just that.
    """

    prefix = "ctc"

    def __init__(self, response_id: str, index: int, call_id: str, tool: ToolEntry) -> None:
        super().__init__(response_id, index)
        self._call_id = call_id
        self._tool = tool
        self._held = ""
        self._is_decided = (tool.format or {}).get("type") == "grammar"

    def item(self, status: str) -> Json:
        item: Json = {
            "id": self.id,
            "type": "custom_tool_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._tool.name,
            "input": self.text,
        }
        return item if self._tool.namespace is None else {**item, "namespace": self._tool.namespace}

    def open(self) -> list[Json]:
        return [self._added()]

    def delta(self, text: str, tokens: tuple[Token, ...]) -> list[Json]:
        if self._is_decided:
            return self._emit(text)
        self._held += text
        start = self._held.lstrip()
        if not start or start[0] in '{"':
            return []
        self._is_decided = True
        return self._release(self._held)

    def close(self, message: Message, is_complete: bool) -> list[Json]:
        events = self._release(_unwrapped(self._held)) if self._held else []
        return [
            *events,
            self._of_item("custom_tool_call_input.done", input=self.text),
            self._done(is_complete),
        ]

    def _release(self, text: str) -> list[Json]:
        self._held = ""
        return self._emit(text)

    def _emit(self, text: str) -> list[Json]:
        self.text += text
        return [self._of_item("custom_tool_call_input.delta", delta=text)] if text else []


def _unwrapped(text: str) -> str:
    """The text inside {"input": text} or "text"; any other text as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, dict) and list(value) == ["input"]:
        value = value["input"]
    return value if isinstance(value, str) else text
