"""What reaches a terminal, and what reaches a pipe."""

from __future__ import annotations

import io

import pytest

from harmonium.screen import DIM, PLAIN, Screen, wrap


def test_control_characters_do_not_reach_a_terminal() -> None:
    out = io.StringIO()
    Screen(out, is_terminal=True).write("a\x1b]0;title\x07b\r\x9b2Jc\u202e\tend\n")
    assert out.getvalue() == "a\ufffd]0;title\ufffdb\ufffd\ufffd2Jc\ufffd\tend\n"


def test_pipe_gets_the_text_as_it_is() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.write("a\x1b[2Jb")
    screen.dim("c")
    assert out.getvalue() == "a\x1b[2Jbc"


def test_dim_text_is_cleaned_before_it_is_dimmed() -> None:
    out = io.StringIO()
    Screen(out, is_terminal=True).dim("a\x1b[0mb")
    assert out.getvalue() == f"{DIM}a\ufffd[0mb{PLAIN}"


def test_end_line_adds_one_line_end_at_most() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.end_line()
    screen.write("a")
    screen.end_line()
    screen.end_line()
    assert out.getvalue() == "a\n"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", [""]),
        ("abcdef", ["abc", "def"]),
        ("abcd\n", ["abc", "d", ""]),
        ("日本語", ["日", "本", "語"]),
        ("a日本", ["a日", "本"]),
        ("e\u0301e\u0301e\u0301", ["e\u0301e\u0301e\u0301"]),
    ],
)
def test_rows_fit_the_width_in_cells(text: str, rows: list[str]) -> None:
    assert wrap(text, 3) == rows


def test_region_leaves_nothing_behind() -> None:
    out = io.StringIO()
    region = Screen(out, is_terminal=True).region()
    region.add("one\ntwo\nthree")
    drawn = out.getvalue()
    assert drawn.count("\n") == 3
    region.clear()
    assert out.getvalue() == f"{drawn}\x1b[3A\r\x1b[0J"
    region.clear()
    assert out.getvalue() == f"{drawn}\x1b[3A\r\x1b[0J"


def test_region_shows_the_last_rows_alone() -> None:
    out = io.StringIO()
    region = Screen(out, is_terminal=True).region()
    region.add("\n".join(f"row {number}" for number in range(100)))
    assert "row 99" in out.getvalue()
    assert "row 91\x1b" not in out.getvalue()
    assert out.getvalue().count("\n") == region.MAX_ROWS


@pytest.mark.parametrize(("term", "expected"), [("xterm", True), ("dumb", False), ("", False)])
def test_dumb_terminal_gets_no_escape_codes(
    term: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", term)
    out = Terminal()
    screen = Screen(out)
    screen.dim("text")
    assert screen.is_terminal is expected
    assert ("\x1b" in out.getvalue()) is expected


def test_region_draws_nothing_into_a_pipe() -> None:
    out = io.StringIO()
    region = Screen(out).region()
    region.add("text")
    region.clear()
    assert out.getvalue() == ""
