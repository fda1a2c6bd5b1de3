"""The generator of the demo model's questions: the split, the answers, the tokens."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from random import Random

import pytest

from demo.mixture import ROW_KINDS, draw_opening, draw_row, is_on_side, one_side, used_tokens
from demo.sample import Opening, Sample, is_held_out, plain
from demo.words import MAX_LETTERS, spelled_words, values
from harmonium.demo_items import demo_items
from harmonium.finetune.rows import PADDING_SEGMENT, Row, fill_row
from harmonium.harmony.messages import REASONING_EFFORTS
from harmonium.harmony.vocabulary import CALL, RETURN, vocabulary


def _rows(count: int, held_out: bool = False) -> list[Row]:
    random = Random(5)
    return [draw_row(random, 384, held_out, kind) for kind in ROW_KINDS for _ in range(count)]


def _samples(count: int) -> list[Sample]:
    """Of each kind of opening, from `count` openings, a few each."""
    return [sample for group in _groups(count) for sample in group]


def _groups(count: int, held_out: bool = False) -> list[list[Sample]]:
    random = Random(5)
    groups = []
    for kind in ROW_KINDS:
        for _ in range(count):
            _, draw = draw_opening(random, kind, held_out)
            groups.append(list(islice(one_side(random, draw, held_out), 4)))
    return groups


def test_nothing_trained_has_a_held_out_key() -> None:
    samples = _samples(40)
    assert len(samples) > 400
    assert not [key for sample in samples for key in sample.keys if is_held_out(key)]


def test_every_key_of_a_held_out_sample_is_held_out() -> None:
    for group in _groups(2, held_out=True):
        assert all(is_held_out(key) for sample in group for key in sample.keys)


def test_no_held_out_question_is_trained() -> None:
    held = {item.messages[-1]["content"] for item in demo_items() if item.skill in ("arithmetic", "text")}
    trained = {sample.question for sample in _samples(40) if sample.skill in ("arithmetic", "text")}
    assert held and trained and not trained & held


def test_the_split_is_decided_by_the_text_alone() -> None:
    assert is_held_out("a") == is_held_out("a")
    share = sum(is_held_out(str(number)) for number in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_sums_are_right_and_worked_out_in_full() -> None:
    sums = [sample for sample in _samples(60) if sample.skill == "arithmetic"]
    assert len(sums) > 50
    for sample in sums:
        lines = plain(sample.analysis).splitlines()
        assert str(_value(lines[0])) == sample.final, sample
        for line in lines:
            steps = line.rpartition(" ")[2].split("=")
            for before, after in pairwise(steps):  # 9*7=63+4=67: each step begins with the last one's result
                assert _value(before) == int(after.partition("+")[0]), sample


def _value(expression: str) -> int:
    """Of a*b+c and such: digits and signs alone."""
    assert set(expression) <= set("0123456789+-*"), expression
    total, sign, term, number = 0, 1, 1, ""
    for letter in f"{expression}+":
        if letter.isdigit():
            number += letter
            continue
        term *= int(number)
        number = ""
        if letter != "*":
            total, term = total + sign * term, 1
            sign = 1 if letter == "+" else -1
    return total


@pytest.mark.parametrize("effort", REASONING_EFFORTS)
def test_reversed_and_capital_words_are_right(effort: str) -> None:
    random = Random(2)
    _, draw = draw_opening(random, "plain", False, effort)  # type: ignore[arg-type]
    seen = 0
    for sample in (draw() for _ in range(400)):
        words = [word for word in spelled_words() if f" {word}" in f" {sample.question}".replace('"', " ")]
        if sample.skill == "text" and sample.keys[0].startswith("reverse "):
            assert plain(sample.final)[::-1] == sample.keys[0].split()[1] in words
            seen += 1
        elif sample.skill == "text" and sample.keys[0].startswith("sort "):
            assert sample.final.split(", ") == sorted(sample.final.split(", "))
            seen += 1
    assert seen > 20


def test_extracted_values_stand_in_the_text() -> None:
    for sample in _samples(30):
        if sample.skill == "extraction":
            assert all(str(value) in sample.question for value in json.loads(sample.final).values())


def test_arguments_stand_in_the_question_and_the_tool_is_declared() -> None:
    random = Random(3)
    for _ in range(30):
        opening, draw = draw_opening(random, "tools", False)
        declared = {tool.name for tool in opening.tools}
        sample = draw()
        if sample.call is not None:
            assert sample.call[0] in declared
            assert all(str(value) in sample.question for value in sample.call[1].values())


def test_high_effort_reasons_at_least_twice_as_long_as_low() -> None:
    lengths = dict.fromkeys(REASONING_EFFORTS, 0)
    for effort in REASONING_EFFORTS:
        for kind in ROW_KINDS:
            _, draw = draw_opening(Random(8), kind, False, effort)
            lengths[effort] += sum(len(draw().pieces()[1][0]) for _ in range(50))
    assert lengths["low"] < lengths["medium"] < lengths["high"]
    assert lengths["high"] > 2 * lengths["low"]


def test_used_tokens_hold_all_that_the_model_writes() -> None:
    used = set(used_tokens())
    written = {
        token
        for row in _rows(25)
        for token, is_target in zip(row.token_ids, row.is_target, strict=True)
        if is_target
    }
    assert {RETURN, CALL} < written <= used


def test_values_and_words_are_one_token_with_a_blank_and_without() -> None:
    for word in (*spelled_words(), *(word for words in values().values() for word in words)):
        assert len(vocabulary().encode(word)) == len(vocabulary().encode(f" {word}")) == 1
    assert all(3 <= len(word) <= MAX_LETTERS for word in spelled_words())


def test_conversations_in_a_row_go_on_from_the_opening() -> None:
    random = Random(1)
    opening, draw = draw_opening(random, "plain", False)
    ids = opening.ids()
    row = fill_row(ids, (sample.pieces() for sample in one_side(random, draw, False)), 300)
    assert row.num_samples > 1
    assert row.token_ids[: len(ids)] == ids and set(row.segments[: len(ids)]) == {0}
    for segment in range(1, row.num_samples + 1):
        positions = [
            position for position, each in zip(row.positions, row.segments, strict=True) if each == segment
        ]
        assert positions == list(range(len(ids), len(ids) + len(positions)))


def test_padding_is_no_target_and_seen_by_nobody() -> None:
    row = draw_row(Random(4), 384)
    assert len(row.token_ids) == len(row.positions) == len(row.segments) == len(row.is_target) == 384
    padding = [index for index, segment in enumerate(row.segments) if segment == PADDING_SEGMENT]
    assert not any(row.is_target[index] for index in padding)


def test_the_same_seed_draws_the_same_row() -> None:
    assert draw_row(Random(11), 384) == draw_row(Random(11), 384)


def test_samples_of_a_side_stay_on_it() -> None:
    random = Random(6)
    _, draw = draw_opening(random, "plain", False)
    samples = one_side(random, draw, True)
    assert all(is_on_side(next(samples), True) for _ in range(20))


def test_an_opening_is_rendered_as_serving_renders_it() -> None:
    text = vocabulary().decode(Opening("low", "2026-11-25", instructions="Be polite.").ids())
    assert "Reasoning: low" in text and "Current date: 2026-11-25" in text and "Be polite." in text
