"""Writing token streams as text: `<|name|>` is one special token, everything else ordinary text."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from harmonium.harmony import SPECIAL_TOKENS, vocabulary

_IDS = {name: token_id for token_id, name in SPECIAL_TOKENS.items()}
_SPECIAL = re.compile(r"(<\|[a-z0-9_]+\|>)")


@pytest.fixture(scope="session")
def tokens() -> Callable[[str], list[int]]:
    """Text with special tokens in it -> ids."""

    def convert(text: str) -> list[int]:
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            ids += [_IDS[part]] if part in _IDS else vocabulary().encode(part)
        return ids

    return convert
