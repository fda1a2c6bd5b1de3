"""Log-probabilities as Chat Completions shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harmonium.engine.protocol import Token
from harmonium.harmony.vocabulary import vocabulary

LEAST = -9999.0
"""What stands for minus infinity, which JSON cannot say; OpenAI's own documented value."""


def logprobs_json(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """A list for `logprobs.content`. Part of a character shows as U+FFFD; its bytes are exact."""
    return [
        {
            **_token_json(token.token_id, token.logprob),
            "top_logprobs": [_token_json(other, logprob) for other, logprob in token.top_logprobs],
        }
        for token in tokens
    ]


def finite(logprob: float | None) -> float:
    """The log-probability as JSON can say it."""
    return LEAST if logprob is None else max(logprob, LEAST)


def _token_json(token_id: int, logprob: float | None) -> dict[str, Any]:
    raw = vocabulary().token_bytes(token_id)
    text = vocabulary().decode([token_id])
    return {"token": text, "logprob": finite(logprob), "bytes": list(raw or text.encode())}
