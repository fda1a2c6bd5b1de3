"""Messages of a chat API (dictionaries with role, content, tool_calls, ...) -> Harmony messages.

    history = messages_from_chat(body["messages"])
    conversation = Conversation(history.messages, instructions=history.instructions, tools=...)

Every field is either understood or refused by a HarmonyError that names index, field and value.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harmonium.errors import HarmonyError
from harmonium.harmony.messages import CONSTRAINED_JSON, Message, Tool, recorded_recipient
from harmonium.harmony.render import instructions_text

REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")
"""The names under which clients send reasoning back; all mean the same."""

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, slots=True)
class ChatHistory:
    """instructions: the leading system and developer messages, joined by empty lines; None where there are
    none.
    """

    instructions: str | None
    messages: tuple[Message, ...]


def messages_from_chat(
    messages: Sequence[Mapping[str, Any]], builtin_tools: Collection[str] = ()
) -> ChatHistory:
    """Turn chat messages (oldest first) into Harmony messages.

    The leading system and developer messages become the instructions, in their order; later ones stay in
    their place as developer messages. An assistant's message becomes its reasoning, then its text (a preamble
    on the commentary channel when calls follow, else the final answer), then its calls. Results follow in the
    order of the calls they answer. builtin_tools: names such as "browser" whose calls keep their recipient.
    Raises HarmonyError for anything else.
    """
    if not isinstance(messages, (list, tuple)):
        raise HarmonyError(f"messages is {_shown(messages)}; expected a list")
    reader = _Reader(frozenset(builtin_tools))
    for index, message in enumerate(messages):
        reader.read(index, message)
    return reader.history()


def tools_from_chat(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Function tools as a chat API gives them: {"type": "function", "function": {...}}, or the same flat.

    Raises HarmonyError for another type, a name that is empty, doubled or holds blanks, and parameters that
    are no object.
    """
    if tools is None:
        return ()
    if not isinstance(tools, (list, tuple)):
        raise HarmonyError(f"tools is {_shown(tools)}; expected a list")
    return tuple(_tool(index, tool) for index, tool in enumerate(tools))


def _tool(index: int, tool: object) -> Tool:
    where = f"tools[{index}]"
    if not isinstance(tool, Mapping):
        raise HarmonyError(f"{where} is {_shown(tool)}; expected an object")
    if tool.get("type", "function") != "function":
        raise HarmonyError(f"{where}.type is {_shown(tool['type'])}; expected 'function'")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise HarmonyError(f"{where}.function is {_shown(function)}; expected an object")
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not name or name.split() != [name]:
        raise HarmonyError(f"{where}.name is {_shown(name)}; expected a name without blanks")
    if name.startswith("functions."):
        raise HarmonyError(f"{where}.name is {_shown(name)}; expected it without the namespace `functions.`")
    if description is not None and not isinstance(description, str):
        raise HarmonyError(f"{where}.description is {_shown(description)}; expected text")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise HarmonyError(f"{where}.parameters is {_shown(parameters)}; expected a JSON schema (an object)")
    return Tool(name, description or "", parameters)


class _Reader:
    """Reads the messages of one chat. Holds the calls made so far, for results name them only by id."""

    def __init__(self, builtin_tools: frozenset[str]) -> None:
        self._builtin_tools = builtin_tools
        self._instructions: list[str] = []
        self._messages: list[Message] = []
        self._calls: dict[str, tuple[int, Message]] = {}
        self._results: list[tuple[int, Message]] = []
        self._is_leading = True

    def history(self) -> ChatHistory:
        self._flush_results()
        instructions = "\n\n".join(self._instructions) if self._instructions else None
        return ChatHistory(instructions, tuple(self._messages))

    def read(self, index: int, message: object) -> None:
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise HarmonyError(f"{where} is {_shown(message)}; expected an object")
        role = message.get("role")
        if role == "tool":
            self._results.append(self._result(where, message))
            self._is_leading = False
            return
        self._flush_results()
        if role in ("system", "developer"):
            self._read_instructions(where, message)
            return
        self._is_leading = False
        if role == "user":
            self._messages.append(Message("user", _text(where, message.get("content"))))
        elif role == "assistant":
            self._read_assistant(where, message)
        else:
            raise HarmonyError(
                f"{where}.role is {_shown(role)}; expected system, developer, user, assistant or tool"
            )

    def _read_instructions(self, where: str, message: Mapping[str, Any]) -> None:
        text = _text(where, message.get("content"))
        if not text:
            return
        if self._is_leading:
            self._instructions.append(text)
        else:
            self._messages.append(Message("developer", instructions_text(text)))

    def _read_assistant(self, where: str, message: Mapping[str, Any]) -> None:
        if message.get("function_call") is not None:
            raise HarmonyError(f"{where}.function_call is not supported; expected tool_calls")
        reasoning = _reasoning(where, message)
        calls = self._tool_calls(where, message.get("tool_calls"))
        content = message.get("content")
        if content is None:
            content = message.get("refusal")
        if reasoning:
            self._messages.append(Message("assistant", reasoning, channel="analysis"))
        if content is not None:
            text = _text(where, content)
            if text or not (reasoning or calls):
                channel = "commentary" if calls else "final"
                self._messages.append(Message("assistant", text, channel=channel))
        self._messages += calls

    def _tool_calls(self, where: str, calls: object) -> list[Message]:
        if calls is None:
            return []
        if not isinstance(calls, (list, tuple)):
            raise HarmonyError(f"{where}.tool_calls is {_shown(calls)}; expected a list")
        return [self._tool_call(f"{where}.tool_calls[{index}]", call) for index, call in enumerate(calls)]

    def _tool_call(self, where: str, call: object) -> Message:
        if not isinstance(call, Mapping):
            raise HarmonyError(f"{where} is {_shown(call)}; expected an object")
        kind = call.get("type", "function")
        if kind not in ("function", "custom"):
            raise HarmonyError(f"{where}.type is {_shown(kind)}; expected 'function' or 'custom'")
        fields = call.get(kind)
        if not isinstance(fields, Mapping):
            raise HarmonyError(f"{where}.{kind} is {_shown(fields)}; expected an object")
        name = fields.get("name")
        if not isinstance(name, str) or not name or name.split() != [name]:
            raise HarmonyError(f"{where}.{kind}.name is {_shown(name)}; expected a name without blanks")
        if kind == "custom":
            message = _custom_call(where, name, fields.get("input", ""))
        else:
            message = self._call_message(name, _arguments(where, fields.get("arguments", "")))
        call_id = call.get("id")
        if call_id is not None:
            if not isinstance(call_id, str):
                raise HarmonyError(f"{where}.id is {_shown(call_id)}; expected text")
            self._calls[call_id] = (len(self._calls), message)
        return message

    def _call_message(self, name: str, arguments: str) -> Message:
        """Built-in tools are called on the analysis channel, functions on the commentary channel."""
        if name.split(".")[0] in self._builtin_tools:
            return Message("assistant", arguments, channel="analysis", recipient=name, content_type="code")
        return Message(
            "assistant",
            arguments,
            channel="commentary",
            recipient=recorded_recipient(name),
            content_type=CONSTRAINED_JSON,
        )

    def _result(self, where: str, message: Mapping[str, Any]) -> tuple[int, Message]:
        """(place of the call among all calls, message) for a tool's result."""
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str):
            raise HarmonyError(f"{where}.tool_call_id is {_shown(call_id)}; expected the id of a call")
        if call_id not in self._calls:
            raise HarmonyError(
                f"{where}.tool_call_id is {_shown(call_id)}; no earlier message has a call of this id"
            )
        place, call = self._calls[call_id]
        content = message.get("content")
        text = "" if content is None else _text(where, content)
        return place, Message("tool", text, channel=call.channel, recipient="assistant", name=call.recipient)

    def _flush_results(self) -> None:
        self._messages += [message for _, message in sorted(self._results, key=lambda pair: pair[0])]
        self._results.clear()


def _arguments(where: str, arguments: object) -> str:
    if isinstance(arguments, Mapping):
        return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    if not isinstance(arguments, str):
        raise HarmonyError(f"{where}.function.arguments is {_shown(arguments)}; expected JSON as text")
    return arguments


def _custom_call(where: str, name: str, text: object) -> Message:
    """A call whose arguments are free text: nothing says that it is JSON."""
    if not isinstance(text, str):
        raise HarmonyError(f"{where}.custom.input is {_shown(text)}; expected text")
    return Message("assistant", text, channel="commentary", recipient=recorded_recipient(name))


def _reasoning(where: str, message: Mapping[str, Any]) -> str:
    given = [(field, message[field]) for field in REASONING_FIELDS if message.get(field)]
    for field, value in given:
        if not isinstance(value, str):
            raise HarmonyError(f"{where}.{field} is {_shown(value)}; expected text")
        if value != given[0][1]:
            raise HarmonyError(f"{where}.{field} differs from {where}.{given[0][0]}; expected one of them")
    return given[0][1] if given else ""


def _text(where: str, content: object) -> str:
    """The text of `content`: a string, or parts that are text, one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise HarmonyError(f"{where}.content is {_shown(content)}; expected text or a list of text parts")
    return "".join(_part_text(f"{where}.content[{index}]", part) for index, part in enumerate(content))


def _part_text(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise HarmonyError(f"{where} is {_shown(part)}; expected a text part")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise HarmonyError(f"{where}.type is {_shown(kind)}; expected 'text': the models read nothing else")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise HarmonyError(f"{where}.{_TEXT_PARTS[kind]} is {_shown(text)}; expected text")
    return text


def _shown(value: object) -> str:
    """A value for a message: short, and safe for values of any depth."""
    if value is None:
        return "missing"
    if isinstance(value, (str, int, float, bool)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
