"""Whatever a call's arguments are, what is sent of them adds up to a JSON object."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from harmonium.server.messages_arguments import RAW_KEY, ObjectText, object_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON, max_size=4)


def sent_in_pieces(text: str, size: int, is_complete: bool = True) -> str:
    arguments = ObjectText()
    pieces = [arguments.push(text[place : place + size]) for place in range(0, len(text), size)]
    return "".join(pieces) + arguments.finish(is_complete)


@settings(max_examples=60, deadline=None)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 2]), st.integers(1, 5))
def test_an_object_is_sent_as_it_is(
    value: dict[str, Any], is_ascii: bool, indent: int | None, size: int
) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    assert sent_in_pieces(text, size) == text
    assert object_of(text) == value


@settings(max_examples=100, deadline=None)
@given(OBJECTS, st.data())
def test_any_mutation_and_any_cut_adds_up_to_an_object(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    place = data.draw(st.integers(0, len(text)))
    noise = data.draw(st.sampled_from(["", '"', "\\", "}", "]", ",", "x", "\n", "\\ud800", "1e999", "{"]))
    text = text[:place] + noise + text[place + data.draw(st.integers(0, 2)) :]
    is_complete = data.draw(st.booleans())
    sent = sent_in_pieces(text, len(text) or 1, is_complete)
    assert sent == sent_in_pieces(text, 1, is_complete)
    if is_complete:
        found = json.loads(sent, parse_constant=pytest.fail)
        assert isinstance(found, dict)
        try:
            assert json.loads(text) == found or RAW_KEY in found
        except ValueError:
            assert found.get(RAW_KEY, text) == text
    assert isinstance(object_of(sent), dict)


@settings(max_examples=30, deadline=None)
@given(OBJECTS)
def test_every_piece_of_a_stream_can_be_read_so_far(value: dict[str, Any]) -> None:
    arguments, sent = ObjectText(), ""
    for char in json.dumps(value):
        sent += arguments.push(char)
        assert not sent or isinstance(from_json(sent, allow_partial=True), dict)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {RAW_KEY: ""}),
        ("ls -R", {RAW_KEY: "ls -R"}),
        ("[1]", {RAW_KEY: "[1]"}),
        ("null", {RAW_KEY: "null"}),
        ('{"a":1}}', {"a": 1}),
        ('{"a":1} and so on', {"a": 1}),
        ('{"a":1', {RAW_KEY: '{"a":1'}),
        ('{"a":[{"b":"c', {"a": [{"b": "c"}], RAW_KEY: '{"a":[{"b":"c'}),
        ('{"a":"\\ud83d', {"a": "", RAW_KEY: '{"a":"\\ud83d'}),
        ('{"a":"\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ('{"a":1e999}', {RAW_KEY: '{"a":1e999}'}),
        ('{"a":' + "[" * 200, None),
    ],
)
def test_what_is_no_object_is_kept_as_text(text: str, expected: dict[str, Any] | None) -> None:
    found = object_of(sent_in_pieces(text, 3))
    assert found[RAW_KEY] == text if expected is None else found == expected


def test_a_call_that_was_cut_off_stays_open() -> None:
    assert sent_in_pieces('{"a": "b", "c": 12', 2, is_complete=False) == '{"a": "b"'
    assert object_of('{"a": "b"') == {"a": "b"}
    assert object_of("") == {}
