"""Model output for tests of what stands on the chat: text in which <|...|> is a special token."""

from __future__ import annotations

import re

from harmonium.harmony.vocabulary import SPECIAL_TOKENS, vocabulary

_IDS = {name: token_id for token_id, name in SPECIAL_TOKENS.items()}

FINAL = "<|channel|>final<|message|>{}<|return|>"
REASONED = (
    "<|channel|>analysis<|message|>think hard<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Hi there<|return|>"
)


def gen(text: str) -> tuple[int, ...]:
    """Its token ids."""
    ids: list[int] = []
    for part in re.split(r"(<\|[a-z]+\|>)", text):
        ids += [_IDS[part]] if part in _IDS else vocabulary().encode(part)
    return tuple(ids)
