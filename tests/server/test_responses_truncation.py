"""truncation auto: what may go, in which order, and what never does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonium.harmony.messages import Message
from harmonium.server.responses_truncation import room_for_answer, truncate

USER = Message("user", "u")
FINAL = Message("assistant", "f", channel="final")
THINK = Message("assistant", "r", channel="analysis")
CALL = Message("assistant", "{}", channel="commentary", recipient="functions.f")
RESULT = Message("tool", "x", name="functions.f")
RULE = Message("developer", "d")


def _length(messages: Sequence[Message]) -> int:
    return len(messages)


def test_nothing_goes_when_all_fits() -> None:
    assert truncate([USER, FINAL, USER], _length, 3).dropped == ()


def test_oldest_blocks_go_first_and_no_more_than_needed() -> None:
    messages = [USER, THINK, FINAL, USER, FINAL, USER]
    assert truncate(messages, _length, 5).dropped == (0,)
    assert truncate(messages, _length, 4).dropped == (0, 1, 2)
    assert truncate(messages, _length, 1).kept == (5,)


def test_call_goes_with_its_result() -> None:
    messages = [USER, THINK, CALL, CALL, RESULT, RESULT, CALL, RESULT, FINAL, USER]
    assert truncate(messages, _length, 8).dropped == (0, 1, 2, 3, 4, 5)
    assert truncate(messages, _length, 3).dropped == (0, 1, 2, 3, 4, 5, 6, 7)


def test_task_and_newest_block_stay_in_a_long_tool_loop() -> None:
    messages = [USER, FINAL, RULE, USER, *[CALL, RESULT] * 3]
    assert truncate(messages, _length, 5).kept == (2, 3, 8, 9)
    assert truncate(messages, _length, 0).kept == (2, 3, 8, 9)


@given(st.lists(st.sampled_from([USER, FINAL, THINK, CALL, RESULT, RULE]), max_size=30), st.integers(0, 30))
def test_laws(messages: list[Message], most: int) -> None:
    cut = truncate(messages, _length, most)
    assert sorted((*cut.kept, *cut.dropped)) == list(range(len(messages)))
    assert all(messages[place].role != "developer" for place in cut.dropped)
    users = [place for place, message in enumerate(messages) if message.role == "user"]
    assert not users or users[-1] in cut.kept
    kept = [messages[place] for place in cut.kept]
    if messages and messages[-1].role != "developer":
        assert kept[-1] is messages[-1]


@pytest.mark.parametrize(
    ("context", "asked", "room"),
    [(131_072, None, 4096), (1000, None, 250), (1000, 100, 100), (1000, 900, 500)],
)
def test_room_for_the_answer(context: int, asked: int | None, room: int) -> None:
    assert room_for_answer(context, asked) == room
