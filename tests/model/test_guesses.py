"""Guesses are read while their like come true."""

from __future__ import annotations

import numpy as np

from harmonium.model.guesses import GuessRecord

FOUR = np.array([7, 3, 5, 1])


def feed(record: GuessRecord, wanted: list[int], times: int, num_tokens: int = 1) -> list[int]:
    chosen: list[int] = []
    for _ in range(times):
        chosen = record.choose(2, FOUR, num_tokens)
        record.judge(2, np.array(wanted, np.int32))
    return chosen


def test_ranks_that_fail_are_no_longer_read_and_come_back_when_they_hold() -> None:
    record = GuessRecord()
    assert record.choose(2, FOUR, 1) == [7, 3, 5, 1], "nothing speaks against them yet"
    record.judge(2, np.array([7, 3, 5, 1], np.int32))
    assert feed(record, [7, 3, 8, 9], 60) == [7, 3]
    assert feed(record, [7, 3, 5, 9], 60) == [7, 3, 5]


def test_long_steps_are_judged_apart() -> None:
    record = GuessRecord()
    assert feed(record, [0], 60) == []
    assert feed(record, [7, 3, 5, 1], 2, num_tokens=500) == [7, 3, 5, 1]
    assert record.choose(2, FOUR, 1) == []


def test_layer_without_a_guess_is_not_judged() -> None:
    record = GuessRecord()
    record.judge(4, np.array([1], np.int32))
    assert record.choose(4, FOUR[:0], 1) == []
