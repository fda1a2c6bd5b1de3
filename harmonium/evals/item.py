"""What an evaluation is made of: items that are asked, replies that come back, verdicts on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a data set.

    id: unique in the task, the same in every run. group: subject or skill, for the table by group ("" for
    none). messages, tools, response_format: as the Chat Completions API takes them. expected: what the judge
    compares with. effort: the only one at which this item is asked; None: each that the run asks for.
    details: what else the task's judge needs.
    """

    id: str
    group: str
    messages: tuple[Mapping[str, Any], ...]
    expected: Any
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Mapping[str, Any] | None = None
    effort: Effort | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answered.

    content: the text for the user, "" for none. reasoning: kept for reading, never judged. tool_calls: name
    and arguments (JSON as text). finish_reason: the server's word; "length" is a truncated answer.
    *_tokens: None where the server does not count them; is_reasoning_counted: whether reasoning_tokens is the
    server's own number or our count of its text. seconds: from sending the request that succeeded to the last
    byte; first_token_seconds: to the first text or call. retries: attempts before it.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    is_reasoning_counted: bool = True
    seconds: float = 0.0
    first_token_seconds: float | None = None
    retries: int = 0

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def is_empty(self) -> bool:
        """Neither text for the user nor a call."""
        return not self.content.strip() and not self.tool_calls


@dataclass(frozen=True, slots=True)
class Verdict:
    """is_right: the answer counts. extracted: what was taken for the answer, None where none was found.
    note: why it is wrong, where that can be said in a line.
    """

    is_right: bool
    extracted: str | None
    note: str = ""
