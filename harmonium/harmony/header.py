"""The header of a message that the model writes: everything between <|start|> and <|message|>.

Well formed it is `assistant<|channel|>NAME[ to=RECIPIENT][ <|constrain|>TYPE]`; the recipient may stand after
the role as well. `HeaderReader` collects its tokens and makes the best of whatever they are; what it cannot
use comes back as problems, word for word, so that no text is lost.

Source: openai/harmony:docs/format.md, "Receiving tool calls"; the malformed kinds are those users reported.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from harmonium.harmony.messages import (
    CHANNELS,
    CONSTRAIN_NAME,
    ROLES,
    function_name,
    function_recipient,
)
from harmonium.harmony.vocabulary import CHANNEL, CONSTRAIN, RETURN, Vocabulary


class Problem(NamedTuple):
    """Something in a header that should not be there. code: as in Diagnostic; text: the words concerned."""

    code: str
    text: str


@dataclass(slots=True)
class Header:
    """What a header says. role: "assistant", or the foreign author. channel: None where none is known.

    body: text of the message that stands in its header because <|message|> is missing.
    """

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    body: str = ""
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_dropped(self) -> bool:
        """Whether the message is nobody's: written in a tool's, user's or unknown author's name.

        A garbled role in front of a final answer or reasoning is forgiven.
        """
        if self.role == "assistant":
            return False
        is_other_author = self.role in ROLES or "." in self.role or ":" in self.role
        return is_other_author or self.recipient is not None or self.channel not in ("final", "analysis")


_ROLE = re.compile(r"(?:assistant)+$")
_GLUED = re.compile(r"((?:assistant)+|analysis|commentary|final)(to=.*)", re.DOTALL)
_TYPE_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*$")
_GLUED_TO_NAME = re.compile(r"^(?:functions\.)+|(?:commentary|analysis|final|json|code)$")
# What a stream that breaks off leaves of ` to=RECIPIENT`; no one-word message of the model's.
_RECIPIENT_BEGUN = re.compile(r"to=?\s*$")
_NO_RECIPIENT = ("all", "user", "assistant")


class HeaderReader:
    """Collects the tokens of one header.

    has_role: the prompt said `<|start|>assistant` already. is_stray: there was no <|start|> at all, so text
    without a channel is no message of anybody's.
    """

    def __init__(
        self, vocabulary: Vocabulary, has_role: bool, is_stray: bool, tool_names: frozenset[str]
    ) -> None:
        self._vocabulary = vocabulary
        self._has_role = has_role
        self._is_stray = is_stray
        self._tool_names = tool_names
        self._segments: list[tuple[int | None, list[int]]] = [(None, [])]
        self.num_tokens = 0

    def add(self, token_id: int) -> None:
        """Take a text token, <|channel|> or <|constrain|>."""
        self.num_tokens += 1
        if token_id in (CHANNEL, CONSTRAIN):
            self._segments.append((token_id, []))
        else:
            self._segments[-1][1].append(token_id)

    def _texts(self) -> list[tuple[int | None, str]]:
        return [
            (marker, b"".join(map(self._vocabulary.token_bytes, ids)).decode("utf-8", errors="replace"))
            for marker, ids in self._segments
        ]

    def text(self) -> str:
        """All text of the header, without the special tokens."""
        return "".join(text for _, text in self._texts())

    def read(self) -> Header:
        """The header as it stands when <|message|> comes."""
        header = Header()
        if self._texts()[0][1][:1].isspace() and not self._has_role:
            header.problems.append(Problem("broken_role", ""))
        for marker, text in self._texts():
            self._read_segment(header, marker, _words(header, text))
        if header.channel is None and not any(code == "unknown_channel" for code, _ in header.problems):
            header.problems.append(Problem("missing_channel", ""))
        return header

    def read_unfinished(self, closed_by: int | None) -> Header:
        """The header when the message ends (closed_by: the token; None: the stream ends) before <|message|>
        comes.

        The text behind what is surely header is the body.
        """
        header = Header()
        header.problems.append(Problem("missing_message", ""))
        texts = self._texts()
        for marker, text in texts[:-1]:
            self._read_segment(header, marker, _words(header, text))
        marker, text = texts[-1]
        if marker == CHANNEL:
            self._read_open_channel(header, text, closed_by)
        elif marker == CONSTRAIN:
            match = re.match(r"\s*([A-Za-z_]*)\s*", text)
            assert match is not None, "the pattern matches everywhere"
            if match[1]:
                _take_type(header, f"{CONSTRAIN_NAME}{match[1]}")
            header.body = text[match.end() :]
        else:
            self._read_open_role(header, text)
        if closed_by is None and _RECIPIENT_BEGUN.match(header.body):
            header.body = ""
        return header

    def _read_open_channel(self, header: Header, text: str, closed_by: int | None) -> None:
        word = re.match(r"\s*(\S*)", text)
        assert word is not None, "the pattern matches everywhere"
        name, rest = word[1], text[word.end() :]
        glued = _GLUED.match(name)
        if glued:
            name, rest = glued[1], f" {glued[2]}{rest}"
        if closed_by == RETURN and name not in CHANNELS and name.startswith("final"):
            name, rest = "final", name.removeprefix("final") + rest  # the answer, its last token says
        if name not in CHANNELS:
            header.problems.append(Problem("unknown_channel", text))
            return
        self._read_segment(header, CHANNEL, [name])
        header.body = self._read_recipient(header, rest)

    def _read_recipient(self, header: Header, text: str) -> str:
        """Take `to=RECIPIENT` and a content type from the front of the text; give the rest."""
        match = re.match(r"\s*to=(\S+)(?:\s+(code|json)(?!\S))?", text)
        if match is None:
            return text.lstrip()
        self._read_word(header, f"to={match[1]}", may_be_type=False)
        if match[2]:
            _take_type(header, match[2])
        return text[match.end() :].lstrip()

    def _read_open_role(self, header: Header, text: str) -> None:
        """No channel at all: the whole text is the message, as refusals are often written."""
        if self._is_stray:
            header.role = "nobody"
            header.problems.append(Problem("stray_text", text))
            return
        role = re.match(r"((?:assistant)+)(?![^\W_])\s*", text)
        if role is None and not self._has_role:
            self._read_segment(header, None, _words(header, text))
            return
        if role is not None:
            if self._has_role or role[1] != "assistant":
                header.problems.append(Problem("broken_role", role[1]))
            text = text[role.end() :]
        header.body = self._read_recipient(header, text)

    def _read_segment(self, header: Header, marker: int | None, words: list[str]) -> None:
        if marker is None:
            words = self._read_role(header, words)
        elif marker == CHANNEL:
            words = self._read_channel(header, words)
        elif words:
            _take_type(header, f"{CONSTRAIN_NAME}{words[0]}")
            words = words[1:]
        else:
            header.problems.append(Problem("missing_type", ""))
        for index, word in enumerate(words):
            is_type = index == len(words) - 1 and (marker is not None or header.recipient is not None)
            self._read_word(header, word, is_type)

    def _read_role(self, header: Header, words: list[str]) -> list[str]:
        """Take the role from the front; give the other words."""
        first = words[0] if words else ""
        if _ROLE.match(first) or first.startswith("assistant:"):
            is_expected = not self._has_role and (first == "assistant" or ":" in first)
            if not is_expected:
                header.problems.append(Problem("broken_role", first))
            return words[1:]
        if self._has_role or self._is_stray:
            return words
        if not first or first.startswith("to="):
            header.problems.append(Problem("broken_role", ""))
            return words
        header.role = first
        header.problems.append(Problem("foreign_role", first))
        return words[1:]

    def _read_channel(self, header: Header, words: list[str]) -> list[str]:
        name = words[0] if words else ""
        known = next((channel for channel in CHANNELS if name.lower().startswith(channel)), None)
        if known is None and header.recipient is None and self._is_tool(name):
            header.problems.append(Problem("bare_recipient", ""))
            header.recipient = name
            return words[1:]
        if known is None or known != name:
            header.problems.append(Problem("unknown_channel", name))
        if header.channel is not None:
            if known is None:
                return words[1:]
            header.problems.append(Problem("repeated_channel", header.channel))
        header.channel = known
        return words[1:]

    def _read_word(self, header: Header, word: str, may_be_type: bool) -> None:
        if word.startswith("to=") and len(word) > 3:
            self._take_recipient(header, word[3:])
        elif header.recipient is None and self._is_tool(word):
            header.problems.append(Problem("bare_recipient", ""))
            header.recipient = word
        elif may_be_type and header.content_type is None and _TYPE_WORD.match(word):
            _take_type(header, word)
        else:
            header.problems.append(Problem("header_text", word))

    def _take_recipient(self, header: Header, recipient: str) -> None:
        if header.recipient is not None:
            header.problems.append(Problem("repeated_recipient", f"to={recipient}"))
        elif recipient in _NO_RECIPIENT and recipient not in self._tool_names:
            header.problems.append(Problem("no_tool", f"to={recipient}"))
        else:
            header.recipient = self._declared_recipient(header, recipient)

    def _declared_recipient(self, header: Header, recipient: str) -> str:
        """The recipient without what is glued to the name of a tool that was offered.

        `functions.functions.f`, `functions.fcommentary` and `functions.fjson` mean f where there is an f and
        no tool of the longer name.
        """
        name = function_name(recipient)
        if is_offered(name, self._tool_names):
            return recipient
        meant = _GLUED_TO_NAME.sub("", name)
        if meant not in self._tool_names:
            return recipient
        header.problems.append(Problem("glued_recipient", name.rpartition(meant)[2]))
        return function_recipient(meant)

    def _is_tool(self, word: str) -> bool:
        return (word.startswith("functions.") and len(word) > 10) or word in self._tool_names


def _take_type(header: Header, content_type: str) -> None:
    """The last content type counts; an earlier one is a problem."""
    if header.content_type is not None:
        header.problems.append(Problem("header_text", header.content_type.removeprefix(CONSTRAIN_NAME)))
    header.content_type = content_type


def _words(header: Header, text: str) -> list[str]:
    """Words between blanks; `commentaryto=f` counts as two, and as a problem."""
    words: list[str] = []
    for word in text.split():
        glued = _GLUED.match(word)
        if glued is not None:
            header.problems.append(Problem("glued_recipient", ""))
        words += glued.groups() if glued else [word]
    return words


def is_offered(name: str, tool_names: Collection[str]) -> bool:
    """Whether a tool is among those offered: by its own name, or by that of its namespace."""
    return name in tool_names or name.split(".")[0] in tool_names
