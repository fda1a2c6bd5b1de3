"""Messages of Anthropic's API (a role and blocks) -> Harmony messages.

    history = read_history(body.system, body.messages, seal)

The order of blocks is kept, but for results, which follow in the order of the calls they answer. Every
block is either understood or refused by an ApiError that names its place and its type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harmonium.errors import ApiError
from harmonium.harmony.chat_history import ChatHistory
from harmonium.harmony.messages import CONSTRAINED_JSON, Message, recorded_recipient
from harmonium.harmony.render import instructions_text
from harmonium.server.errors import wrong_value
from harmonium.server.responses_seal import Seal

ERROR_PREFIX = "Error: "
"""Stands before a result with is_error: Harmony has no mark for a failure but words."""

CLIENT_MARK = "x-anthropic-billing-header:"
"""A block of `system` that begins so is a client's note to Anthropic; left out, for it is no instruction, and
changes from request to request, so that no cached prefix would ever fit.
"""

_TEXT_ONLY = "text: the models read nothing else"


def read_history(
    system: str | Sequence[Mapping[str, Any]] | None, messages: Sequence[Mapping[str, Any]], seal: Seal
) -> ChatHistory:
    """`system` and `messages` (oldest first).

    instructions: `system`, then leading messages of the role system, joined by empty lines. seal: of the
    signatures of thinking blocks. Raises ApiError for anything that cannot be read.
    """
    reader = _Reader(seal)
    reader.read_system(system)
    for index, message in enumerate(messages):
        reader.read(f"messages[{index}]", message)
    instructions = "\n\n".join(reader.instructions) if reader.instructions else None
    return ChatHistory(instructions, tuple(reader.messages))


class _Reader:
    """Reads the messages of one request. Holds the calls made so far, for results name them only by id."""

    def __init__(self, seal: Seal) -> None:
        self.instructions: list[str] = []
        self.messages: list[Message] = []
        self._seal = seal
        self._calls: dict[str, tuple[int, str]] = {}

    def read_system(self, system: str | Sequence[Mapping[str, Any]] | None) -> None:
        for text in [system] if isinstance(system, str) else _texts("system", system or []):
            if text and not text.startswith(CLIENT_MARK):
                self.instructions.append(text)

    def read(self, where: str, message: Mapping[str, Any]) -> None:
        role, blocks = message.get("role"), _blocks(f"{where}.content", message.get("content"))
        if role == "user":
            self._read_user(where, blocks)
        elif role == "assistant":
            self._read_assistant(where, blocks)
        elif role == "system":
            text = "\n\n".join(_texts(f"{where}.content", blocks))
            if not self.messages:
                self.instructions.append(text)
            else:
                self.messages.append(Message("developer", instructions_text(text)))
        else:
            raise wrong_value(f"{where}.role", role, "user, assistant or system")

    def _read_user(self, where: str, blocks: Sequence[Mapping[str, Any]]) -> None:
        texts: list[str] = []
        results: list[tuple[int, Message]] = []
        for index, block in enumerate(blocks):
            place = f"{where}.content[{index}]"
            if block.get("type") == "tool_result":
                results.append(self._result(place, block))
            else:
                texts.append(_text(place, block, "text or tool_result"))
        self.messages += [message for _, message in sorted(results, key=lambda pair: pair[0])]
        if any(texts) or not results:
            self.messages.append(Message("user", "\n\n".join(text for text in texts if text)))

    def _result(self, where: str, block: Mapping[str, Any]) -> tuple[int, Message]:
        """(place of the call among all calls, message)."""
        call_id = block.get("tool_use_id")
        if not isinstance(call_id, str) or call_id not in self._calls:
            raise wrong_value(f"{where}.tool_use_id", call_id, "the id of an earlier tool_use block")
        content = block.get("content")
        text = "" if content is None else "".join(_texts(f"{where}.content", content))
        is_error = block.get("is_error")
        if is_error not in (None, True, False):
            raise wrong_value(f"{where}.is_error", is_error, "true or false")
        if is_error:
            text = f"{ERROR_PREFIX}{text}"
        place, name = self._calls[call_id]
        return place, Message("tool", text, channel="commentary", recipient="assistant", name=name)

    def _read_assistant(self, where: str, blocks: Sequence[Mapping[str, Any]]) -> None:
        texts = [index for index, block in enumerate(blocks) if block.get("type") == "text"]
        has_calls = any(block.get("type") == "tool_use" for block in blocks)
        answer = texts[-1] if texts and not has_calls else None
        before = len(self.messages)
        for index, block in enumerate(blocks):
            place = f"{where}.content[{index}]"
            match block.get("type"):
                case "thinking":
                    self._read_thinking(place, block)
                case "redacted_thinking":
                    pass  # of another provider's model, and nobody here can read it
                case "tool_use":
                    self._read_call(place, block)
                case _:
                    text = _text(place, block, "text, thinking, redacted_thinking or tool_use")
                    if text:
                        channel = "final" if index == answer else "commentary"
                        self.messages.append(Message("assistant", text, channel=channel))
        if len(self.messages) == before:
            self.messages.append(Message("assistant", "", channel="final"))

    def _read_thinking(self, where: str, block: Mapping[str, Any]) -> None:
        """With our signature under it, the tokens that the model wrote; else its text as it is."""
        text, signature = block.get("thinking"), block.get("signature") or ""
        if not isinstance(text, str):
            raise wrong_value(f"{where}.thinking", text, "text")
        if not isinstance(signature, str):
            raise wrong_value(f"{where}.signature", signature, "text")
        sealed = self._seal.open(signature) if signature else None
        if sealed is not None and text in ("", sealed.text):
            message = Message("assistant", sealed.text, channel="analysis", token_ids=sealed.token_ids)
            self.messages.append(message)
        elif text:
            self.messages.append(Message("assistant", text, channel="analysis"))

    def _read_call(self, where: str, block: Mapping[str, Any]) -> None:
        name, given, call_id = (block.get(key) for key in ("name", "input", "id"))
        if not isinstance(name, str) or not name or name.split() != [name]:
            raise wrong_value(f"{where}.name", name, "a name without blanks")
        if not isinstance(given, Mapping):
            raise wrong_value(f"{where}.input", given, "an object")
        if not isinstance(call_id, str) or not call_id:
            raise wrong_value(f"{where}.id", call_id, "text")
        recipient = recorded_recipient(name)
        self._calls[call_id] = (len(self._calls), recipient)
        arguments = json.dumps(given, ensure_ascii=False, separators=(",", ":"))
        self.messages.append(
            Message(
                "assistant",
                arguments,
                channel="commentary",
                recipient=recipient,
                content_type=CONSTRAINED_JSON,
            )
        )


def _blocks(where: str, content: object) -> list[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise wrong_value(where, content, "text or a list of blocks")
    for index, block in enumerate(content):
        if not isinstance(block, Mapping):
            raise wrong_value(f"{where}[{index}]", block, "a block (an object)")
    return content


def _texts(where: str, content: object) -> list[str]:
    """Of content that is text alone."""
    return [
        _text(f"{where}[{index}]", block, _TEXT_ONLY) for index, block in enumerate(_blocks(where, content))
    ]


def _text(where: str, block: Mapping[str, Any], expected: str) -> str:
    kind = block.get("type")
    if kind != "text":
        raise _unreadable(where, kind, expected)
    text = block.get("text")
    if not isinstance(text, str):
        raise wrong_value(f"{where}.text", text, "text")
    return text


def _unreadable(where: str, kind: object, expected: str) -> ApiError:
    if kind in ("image", "document"):
        expected = _TEXT_ONLY
    return wrong_value(f"{where}.type", kind, expected)
