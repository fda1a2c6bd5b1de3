"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from harmonium.engine.protocol import Token
from harmonium.stop_text import StopText

LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


def shown(pieces: list[str], stops: list[str]) -> tuple[str, list[int], str | None]:
    finder = StopText(stops)
    found = [finder.push(text, (Token(number),)) for number, text in enumerate(pieces)]
    found.append(finder.finish())
    given_out = [piece for piece in found if piece is not None]
    tokens = [token.token_id for piece in given_out for token in piece.tokens]
    return "".join(piece.text for piece in given_out), tokens, finder.found


@given(st.lists(LETTERS.filter(bool), max_size=6), STOPS)
def test_text_ends_before_the_first_stop_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    # The stop that is complete first wins; of those that end together, the one that begins first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    visible, tokens, found = shown(list(text), stops)
    assert visible == (text if not ends else text[: min(ends)[1]])
    assert (found is None) == (not ends)
    assert tokens == list(range(len(visible)))


@given(st.lists(LETTERS.filter(bool), max_size=6), STOPS)
def test_pieces_of_any_size_show_the_same_text_and_whole_tokens(pieces: list[str], stops: list[str]) -> None:
    visible, tokens, found = shown(pieces, stops)
    assert (visible, found) == shown(list("".join(pieces)), stops)[::2]
    num_started = 0
    while len("".join(pieces[:num_started])) < len(visible):
        num_started += 1
    assert tokens == list(range(num_started))


def test_what_may_be_a_stop_waits_and_what_is_none_does_not() -> None:
    finder = StopText(["</end>"])
    assert finder.push("a</", ()).text == "a"  # type: ignore[union-attr]
    assert finder.push("en", ()) is None
    assert finder.push("x", ()).text == "</enx"  # type: ignore[union-attr]
    assert finder.push("</end> b", ()) is None
    assert finder.found == "</end>"
    assert finder.finish() is None
