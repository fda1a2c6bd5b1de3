"""The chunks of a streamed chat completion, added up to a Reply."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from harmonium.evals.item import Reply
from harmonium.harmony.vocabulary import vocabulary

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which servers send it; ours sends the first two with the same text, so one alone is read."""


class StreamFailed(Exception):
    """The server says, or its chunks show, that this answer will not become whole."""


class ReplyBuilder:
    """push each chunk, then finish."""

    def __init__(self, started: float, retries: int) -> None:
        """started: time.monotonic() when the request was sent."""
        self._started = started
        self._retries = retries
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, list[str]] = {}  # index -> [name, arguments]
        self._finish_reason: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._first: float | None = None

    def push(self, event: Mapping[str, Any]) -> None:
        """Raises StreamFailed for an error event and for chunks of another form."""
        if event.get("error"):
            error = event["error"]
            raise StreamFailed(str(error.get("message", error) if isinstance(error, Mapping) else error))
        self._usage = event.get("usage") or self._usage
        try:
            for choice in event.get("choices") or ():
                self._push_delta(choice.get("delta") or {})
                self._finish_reason = choice.get("finish_reason") or self._finish_reason
        except (AttributeError, TypeError, KeyError) as error:
            raise StreamFailed(f"a chunk has not the form of OpenAI's API ({error})") from None

    def _push_delta(self, delta: Mapping[str, Any]) -> None:
        reasoning = next((delta[name] for name in REASONING_FIELDS if delta.get(name)), "")
        content = delta.get("content") or ""
        if not isinstance(reasoning, str) or not isinstance(content, str):
            raise TypeError("text expected")
        self._reasoning.append(reasoning)
        self._content.append(content)
        calls = delta.get("tool_calls") or ()
        for call in calls:
            entry = self._calls.setdefault(int(call.get("index", 0)), ["", ""])
            function = call.get("function") or {}
            entry[0] += function.get("name") or ""
            entry[1] += function.get("arguments") or ""
        if self._first is None and (reasoning or content or calls):
            self._first = time.monotonic() - self._started

    def finish(self) -> Reply:
        """Raises StreamFailed when no choice came to its end."""
        if self._finish_reason is None:
            raise StreamFailed("the stream ended without a finish_reason")
        reasoning = "".join(self._reasoning)
        details = self._usage.get("completion_tokens_details") or {}
        counted = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
        if counted is None:
            # vLLM and llama.cpp leave it out. gpt-oss's tokens can be counted from the text.
            counted_here: int | None = len(vocabulary().encode(reasoning))
        else:
            counted_here = None
        return Reply(
            content="".join(self._content),
            reasoning=reasoning,
            tool_calls=tuple((name, arguments) for _, (name, arguments) in sorted(self._calls.items())),
            finish_reason=self._finish_reason,
            prompt_tokens=_count(self._usage.get("prompt_tokens")),
            completion_tokens=_count(self._usage.get("completion_tokens")),
            reasoning_tokens=_count(counted) if counted_here is None else counted_here,
            is_reasoning_counted=counted_here is None,
            seconds=time.monotonic() - self._started,
            first_token_seconds=self._first,
            retries=self._retries,
        )


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
