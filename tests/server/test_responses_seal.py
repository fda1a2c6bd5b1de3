"""encrypted_content: only its own store opens it."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonium.server.responses_seal import Seal, SealedReasoning, new_key

SEAL = Seal(new_key())


@given(st.text(), st.none() | st.lists(st.integers(0, 201_087)))
def test_what_is_closed_opens_as_it_was(text: str, token_ids: list[int] | None) -> None:
    reasoning = SealedReasoning(text, None if token_ids is None else tuple(token_ids))
    assert SEAL.open(SEAL.close(reasoning)) == reasoning


def test_other_key_does_not_open() -> None:
    assert Seal(new_key()).open(SEAL.close(SealedReasoning("x"))) is None


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_one_altered_byte_does_not_open(place: int, change: int) -> None:
    data = bytearray(base64.urlsafe_b64decode(SEAL.close(SealedReasoning("think hard", (200006, 5)))))
    data[place % len(data)] ^= change
    assert SEAL.open(base64.urlsafe_b64encode(bytes(data)).decode()) is None


@pytest.mark.parametrize("text", ["", "A", "====", "not base64!", "é", "AAAA" * 100, "gAAAAABm" * 20])
def test_foreign_text_does_not_open(text: str) -> None:
    assert SEAL.open(text) is None
