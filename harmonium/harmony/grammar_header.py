"""The headers that may open a message, as a tree of token ids.

A header is the canonical tokens of what the model was trained to write, and nothing else; so a choice costs a
mask only where two headers part, and the rest of the way is forced.

Source: openai/harmony:docs/format.md. The order of a call's header is the model's own (docs/grammar.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntFlag

from harmonium.harmony.grammar_compile import CompiledText
from harmonium.harmony.messages import Tool, ToolNamespace, function_recipient
from harmonium.harmony.vocabulary import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, vocabulary


class MessageKind(IntFlag):
    """What a message is, as bits: a turn allows some of them at a time."""

    REASONING = 1
    PREAMBLE = 2
    FINAL = 4
    CALL = 8


NO_MESSAGE = MessageKind(0)


@dataclass(frozen=True, slots=True)
class Body:
    """What follows a header. text: None where it is free. end: the token that closes it."""

    kind: MessageKind
    end: int
    text: CompiledText | None = None
    subject: str = ""


@dataclass(slots=True)
class Node:
    """A place in a header. kinds: of the messages that can be reached from here. body: set behind
    <|message|>, where `next` is empty.
    """

    kinds: MessageKind = NO_MESSAGE
    next: dict[int, Node] = field(default_factory=dict)
    body: Body | None = None

    def reach(self, token_ids: Sequence[int], kind: MessageKind) -> Node:
        """The place behind these tokens, on the way to a message of this kind; made where there is none."""
        node = self
        node.kinds |= kind
        for token_id in token_ids:
            node = node.next.setdefault(token_id, Node())
            node.kinds |= kind
        return node

    def add(self, token_ids: Sequence[int], body: Body) -> None:
        """Let this header lead to this body. Of two bodies for one header the first one stays."""
        node = self.reach(token_ids, body.kind)
        if node.body is None:
            node.body = body

    def allowed(self, kinds: MessageKind) -> list[int]:
        """The tokens that lead on towards a message of these kinds."""
        return [token_id for token_id, node in self.next.items() if node.kinds & kinds]


@dataclass(frozen=True, slots=True)
class Callee:
    """Somebody whom a call can go to. name: as requests know the tool. takes_json: what its input is."""

    name: str
    recipient: str
    channels: tuple[str, ...]
    takes_json: bool


def callees(
    tools: Iterable[Tool], builtin_tools: Iterable[ToolNamespace], freeform: Iterable[str]
) -> list[Callee]:
    """Functions, called in the commentary channel; tools of namespaces, which may be called while reasoning.

    freeform: names of functions whose input is text.
    """
    free = set(freeform)
    found = [
        Callee(tool.name, function_recipient(tool.name), ("commentary",), tool.name not in free)
        for tool in tools
    ]
    for namespace in builtin_tools:
        names = [f"{namespace.name}.{tool.name}" for tool in namespace.tools] or [namespace.name]
        takes_json = bool(namespace.tools)
        found += [Callee(name, name, ("analysis", "commentary"), takes_json) for name in names]
    return found


def message_headers(final: Body, allows_json_type: bool) -> Node:
    """The tree with reasoning, preamble and final answer: what stands behind `<|start|>assistant`."""
    encode = vocabulary().encode
    root = Node()
    root.add([CHANNEL, *encode("analysis"), MESSAGE], Body(MessageKind.REASONING, END))
    root.add([CHANNEL, *encode("commentary"), MESSAGE], Body(MessageKind.PREAMBLE, END))
    root.add([CHANNEL, *encode("final"), MESSAGE], final)
    if allows_json_type:
        root.add([CHANNEL, *encode("final"), *_json_type(), MESSAGE], final)
    return root


def add_call_headers(root: Node, callee: Callee, body: Body) -> None:
    """The ways to call a tool: its recipient behind the channel, as the model does it, or behind the role, as
    the format's documents have it too; with and without a content type.
    """
    encode = vocabulary().encode
    types = [[], encode(" code")]
    if callee.takes_json:
        types += [_json_type(), encode(" json")]
    tail = Node()  # one for all ways: a request may offer a hundred tools
    for content_type in types:
        tail.add([*content_type, MESSAGE], body)
    for channel in callee.channels:
        behind_channel = [CHANNEL, *encode(f"{channel} to={callee.recipient}")]
        behind_role = [*encode(f" to={callee.recipient}"), CHANNEL, *encode(channel)]
        for way in (behind_channel, behind_role):
            end = root.reach(way, body.kind)
            for token_id, node in tail.next.items():
                end.next.setdefault(token_id, node)


def _json_type() -> list[int]:
    encode = vocabulary().encode
    return [*encode(" "), CONSTRAIN, *encode("json")]


def final_body(text: CompiledText | None) -> Body:
    """The answer, which ends the turn."""
    return Body(MessageKind.FINAL, RETURN, text, "the final answer")


def call_body(text: CompiledText | None, subject: str) -> Body:
    """A call's input."""
    return Body(MessageKind.CALL, CALL, text, subject)
