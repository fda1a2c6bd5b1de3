"""Items of the Responses API -> Harmony messages.

An item (a message, reasoning, a call, a result) is one `Entry`: the Harmony message it stands for, and what
later items refer to. A conversation is a list of entries, those of earlier responses first; `compose` makes
the messages of a prompt from it. Whatever this server put out is accepted back, with or without its ids,
status and empty fields. What cannot be read is a RequestError that names the place.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harmonium.errors import RequestError
from harmonium.harmony.messages import CONSTRAINED_JSON, Message, Role, recorded_recipient
from harmonium.harmony.render import instructions_text
from harmonium.server.responses_seal import Seal
from harmonium.server.responses_tools import declared_name

Item = dict[str, Any]

_TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}
_ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
_FOREIGN_TYPES = (
    # What other servers' tools leave in a history. Nothing in them is meant for the model here.
    "web_search_call",
    "file_search_call",
    "image_generation_call",
    "code_interpreter_call",
    "mcp_list_tools",
    "tool_search_call",
    "tool_search_output",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One message of a conversation. call_id: of a call, or of the call that a result answers.

    A developer's message holds its bare text, and an assistant's text that came without a phase has no
    channel: both are settled by `compose`, which knows what stands around them.
    """

    message: Message
    item_id: str
    call_id: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For the store."""
        message = self.message
        return {
            "item_id": self.item_id,
            "call_id": self.call_id,
            "role": message.role,
            "content": message.content,
            "channel": message.channel,
            "recipient": message.recipient,
            "content_type": message.content_type,
            "name": message.name,
            "token_ids": message.token_ids,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Entry:
        """What `to_json` wrote."""
        token_ids = record["token_ids"]
        message = Message(
            role=record["role"],
            content=record["content"],
            channel=record["channel"],
            recipient=record["recipient"],
            content_type=record["content_type"],
            name=record["name"],
            token_ids=None if token_ids is None else tuple(token_ids),
        )
        return cls(message, record["item_id"], record["call_id"])


@dataclass(frozen=True, slots=True)
class InputItems:
    """The input of one request. items: as GET .../input_items lists them, each with an id. entries: what they
    mean. warnings: what was left out.
    """

    items: tuple[Item, ...]
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...] = ()


ItemLookup = Callable[[str], "tuple[Item, Entry] | None"]
"""Finds an item that an earlier response stored, by its id."""


def read_input(
    value: str | Sequence[Mapping[str, Any]] | None,
    earlier: Iterable[Entry],
    seal: Seal,
    lookup: ItemLookup = lambda item_id: None,
) -> InputItems:
    """Read the input of a request. earlier: the conversation that it continues, for its calls.

    Raises RequestError that names the item for a type, role or part that cannot be read, a result without a
    call, reasoning whose seal is not ours, and a reference to an item that is not stored.
    """
    reader = _Reader(earlier, seal, lookup)
    if isinstance(value, str):
        value = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    for index, item in enumerate(value or ()):
        reader.read(f"input[{index}]", item)
    return InputItems(tuple(reader.items), tuple(reader.entries), tuple(reader.warnings))


class _Reader:
    """Reads items in their order. Holds the calls made so far: results name them only by id."""

    def __init__(self, earlier: Iterable[Entry], seal: Seal, lookup: ItemLookup) -> None:
        self.items: list[Item] = []
        self.entries: list[Entry] = []
        self.warnings: list[str] = []
        self._seal = seal
        self._lookup = lookup
        self._calls = {
            entry.call_id: entry.message
            for entry in earlier
            if entry.call_id is not None and entry.message.role == "assistant"
        }

    def read(self, where: str, item: object) -> None:
        if not isinstance(item, Mapping):
            raise RequestError(f"{where} is {_shown(item)}; expected an item (an object with a type)")
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "item_reference":
            self._refer(where, item)
            return
        if kind in _FOREIGN_TYPES:
            self.warnings.append(f"{where} of type {kind} was left out: its tool does not run here")
            return
        if not isinstance(kind, str) or kind not in _ID_PREFIXES:
            expected = ", ".join((*_ID_PREFIXES, "item_reference"))
            raise RequestError(f"{where}.type is {_shown(kind)}; expected one of {expected}")
        item_id = _optional_text(where, item, "id") or f"{_ID_PREFIXES[kind]}_{uuid.uuid4().hex}"
        messages = {
            "message": self._message,
            "reasoning": self._reasoning,
            "function_call": self._call,
            "custom_tool_call": self._call,
            "function_call_output": self._result,
            "custom_tool_call_output": self._result,
        }[kind](where, item)
        self._add({**item, "type": kind, "id": item_id}, messages, item.get("call_id"))

    def _add(self, item: Item, message: Message | None, call_id: object) -> None:
        if item["type"] == "message" and isinstance(item.get("content"), str):
            kind = "output_text" if item["role"] == "assistant" else "input_text"
            item["content"] = [{"type": kind, "text": item["content"]}]
        self.items.append(item)
        if message is None:
            return
        known = call_id if isinstance(call_id, str) else None
        self.entries.append(Entry(message, item["id"], known))
        if known is not None and message.role == "assistant":
            self._calls[known] = message

    def _refer(self, where: str, item: Mapping[str, Any]) -> None:
        item_id = _text_field(where, item, "id")
        found = self._lookup(item_id)
        if found is None:
            raise RequestError(f"{where}.id is {_shown(item_id)}; no stored response has an item of this id")
        stored, entry = found
        self._add(dict(stored), entry.message, entry.call_id)

    def _message(self, where: str, item: Mapping[str, Any]) -> Message:
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise RequestError(
                f"{where}.role is {_shown(role)}; expected user, assistant, system or developer"
            )
        text = _content_text(where, item.get("content"))
        if role == "assistant":
            phase = item.get("phase")
            channel = {"commentary": "commentary", "final_answer": "final"}.get(str(phase))
            return Message("assistant", text, channel=channel)
        author: Role = "user" if role == "user" else "developer"
        return Message(author, text)

    def _reasoning(self, where: str, item: Mapping[str, Any]) -> Message | None:
        sealed = _optional_text(where, item, "encrypted_content")
        opened = self._seal.open(sealed) if sealed else None
        if opened is not None:
            return Message("assistant", opened.text, channel="analysis", token_ids=opened.token_ids)
        content, summary = (item.get(key) or [] for key in ("content", "summary"))
        text = _content_text(where, content) or _content_text(where, summary, "summary")
        if sealed and not text:
            raise RequestError(
                f"{where}.encrypted_content was not made by this server's store (or was altered), and the "
                "item has no content to use in its place; leave the item out, or keep the store with --store"
            )
        if sealed:
            self.warnings.append(f"{where}.encrypted_content is not ours; the item's content was used")
        return Message("assistant", text, channel="analysis") if text else None

    def _call(self, where: str, item: Mapping[str, Any]) -> Message:
        is_custom = item.get("type") == "custom_tool_call"
        name, call_id = _text_field(where, item, "name"), _text_field(where, item, "call_id")
        if not name or name.split() != [name] or not call_id:
            raise RequestError(
                f"{where}.name is {_shown(name)}; expected a name without blanks, and a call_id"
            )
        payload = item.get("input" if is_custom else "arguments", "")
        if isinstance(payload, Mapping):
            payload = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
        if not isinstance(payload, str):
            raise RequestError(
                f"{where}.{'input' if is_custom else 'arguments'} is {_shown(payload)}; expected text"
            )
        recipient = recorded_recipient(declared_name(name, _optional_text(where, item, "namespace")))
        content_type = None if is_custom else CONSTRAINED_JSON
        return Message(
            "assistant", payload, channel="commentary", recipient=recipient, content_type=content_type
        )

    def _result(self, where: str, item: Mapping[str, Any]) -> Message:
        call_id = _text_field(where, item, "call_id")
        call = self._calls.get(call_id)
        if call is None:
            raise RequestError(
                f"{where}.call_id is {_shown(call_id)}; no earlier item has a call of this id, nor has "
                "previous_response_id"
            )
        output = item.get("output")
        text = "" if output is None else _content_text(where, output, "output")
        return Message("tool", text, channel=call.channel, recipient="assistant", name=call.recipient)


@dataclass(frozen=True, slots=True)
class Composed:
    """What a prompt is made of. item_ids: of each message, in the same order."""

    instructions: str | None
    messages: tuple[Message, ...]
    item_ids: tuple[str, ...] = field(default=())


def compose(instructions: str | None, entries: Sequence[Entry]) -> Composed:
    """Instructions and messages of a conversation.

    The request's instructions come first, then the leading developer and system messages; later ones stay in
    their place. Results follow in the order of the calls that they answer. An assistant's text of unknown
    phase is a preamble when a call follows it in the same turn, else a final answer.
    """
    texts = [instructions] if instructions else []
    start = 0
    while start < len(entries) and entries[start].message.role == "developer":
        texts.append(entries[start].message.content)
        start += 1
    ordered = _with_ordered_results(_settled(entries[start:]))
    joined = "\n\n".join(text for text in texts if text) or None
    return Composed(
        joined, tuple(entry.message for entry in ordered), tuple(entry.item_id for entry in ordered)
    )


def _settled(entries: Sequence[Entry]) -> list[Entry]:
    """The entries as messages of a prompt. Read from the end: what an answer is depends on what follows."""
    settled: list[Entry] = []
    call_follows = False
    for entry in reversed(entries):
        message = entry.message
        if message.role != "assistant":
            call_follows = False
        elif message.recipient is not None:
            call_follows = True
        if message.role == "developer":
            if not message.content:
                continue
            message = Message("developer", instructions_text(message.content))
        elif message.role == "assistant" and message.channel is None:
            channel = "commentary" if call_follows else "final"
            message = Message("assistant", message.content, channel=channel)
        settled.append(Entry(message, entry.item_id, entry.call_id))
    settled.reverse()
    return settled


def _with_ordered_results(entries: Sequence[Entry]) -> list[Entry]:
    order = {entry.call_id: place for place, entry in enumerate(entries) if entry.message.role == "assistant"}
    ordered: list[Entry] = []
    results: list[Entry] = []
    for entry in entries:
        if entry.message.role == "tool":
            results.append(entry)
            continue
        ordered += sorted(results, key=lambda result: order.get(result.call_id, 0))
        results = []
        ordered.append(entry)
    return ordered + sorted(results, key=lambda result: order.get(result.call_id, 0))


def _content_text(where: str, content: object, name: str = "content") -> str:
    """The text of a string, or of text parts one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{where}.{name} is {_shown(content)}; expected text or a list of text parts")
    return "".join(_part_text(f"{where}.{name}[{index}]", part) for index, part in enumerate(content))


def _part_text(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise RequestError(f"{where}.type is {_shown(kind)}; expected text: the models read nothing else")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise RequestError(f"{where}.{_TEXT_PARTS[kind]} is {_shown(text)}; expected text")
    return text


def _text_field(where: str, item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{key} is {_shown(value)}; expected text")
    return value


def _optional_text(where: str, item: Mapping[str, Any], key: str) -> str | None:
    return None if item.get(key) is None else _text_field(where, item, key)


def _shown(value: object) -> str:
    """A value for a message: short whatever it is."""
    if value is None:
        return "missing"
    if isinstance(value, (str, int, float, bool)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else "a value"
