r"""Answers are found where they stand, and only there."""

from __future__ import annotations

from decimal import Decimal

import pytest

from harmonium.evals.answers import boxed, choice_letter, number, whole_number


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{33}.", "33"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{12} but \boxed{13", "12"),
        (r"\boxed{}", ""),
        ("boxed 12", None),
        ("", None),
    ],
)
def test_last_complete_box_is_read(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(c)", "C"),
        ("**D**", "D"),
        ("Answer: B", "B"),
        ("Answer: (B) because of that", "B"),
        ("Answer: **A**", "A"),
        ("**Answer: A**", "A"),
        ("**Answer:** A", "A"),
        ("Answer: $\\boxed{C}$", "C"),
        (r"\boxed{\text{D}}", "D"),
        (r"\boxed{D) 12 m}", "D"),
        ("The correct answer is option C.", "C"),
        ("The answer is A or B.\nAnswer: C", "C"),
        ("Answer: A\nOn reflection that is wrong.\nAnswer: B", "B"),
        ("I think B.\n\nD", "D"),
        ("C. Because the mass is conserved.", "C"),
        ("It cannot be (A).\nThe answer is (B)", "B"),
        ("\uff21\uff4e\uff53\uff57\uff45\uff52\uff1a\uff22", "B"),  # full width
        ("answer = d", "D"),
        ("A) one\nB) two\n\nB", "B"),
        ("Among these, only (B) fits.", "B"),
        ("Final answer\n\n**B**", "B"),
        # No choice is made here.
        ("", None),
        ("The answer is A or B.", None),
        ("The answer is a, well, long story.", None),
        ("The answer is not among them.", None),
        ("Answer: A mixture of both.", None),
        ("Answer: E", None),
        ("(A) and (B) both fit.", None),
        ("A) one\nB) two\nC) three\nD) four", None),
        (r"\boxed{}", None),
        (r"\boxed{A, B}", None),
        ("I cannot answer that.", None),
    ],
)
def test_letter_that_is_chosen(text: str, letter: str | None) -> None:
    assert choice_letter(text, "ABCD") == letter


def test_letters_are_those_of_the_question() -> None:
    assert choice_letter("Answer: J", "ABCDEFGHIJ") == "J"
    assert choice_letter("Answer: C", "AB") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("The answer is 18.", 18),
        ("Answer: 18 eggs (2 boxes of 9)", 18),
        ("She makes 9 * 2 = $18 every day.", 18),
        ("#### 1,234", 1234),
        ("first 3, then 4", 4),
        ("total: 1,234,567", 1234567),
        (r"\boxed{1{,}234}", 1234),
        (r"\boxed{1\,234}", 1234),
        (r"\boxed{\$70{,}000}", 70000),
        (r"\boxed{m + n = 113}", 113),
        (r"\boxed{033}", 33),
        (r"\boxed{33.0}", 33),
        (r"\boxed{\text{17 apples}}", 17),
        (r"\boxed{-5}", -5),
        ("Answer: \u22125", -5),
        ("**Answer:** 42", 42),
        ("Answer: 6 - 2 = 4", 4),
        ("Answer: unknown\nso 5", 5),
        (r"\boxed{16} is wrong, \boxed{17}", 17),
        ("pages 3-5", 5),
        (r"50\% of 10 is \boxed{5}", 5),
        # None of these is a whole number.
        ("", None),
        ("no number here", None),
        (r"\boxed{\frac{1}{2}}", None),
        (r"\boxed{1/2}", None),
        (r"\boxed{2.5}", None),
        (r"\boxed{2 or 3}", None),
        (r"\boxed{2, 3}", None),
        (r"\boxed{}", None),
        (r"\boxed{x}", None),
        (r"\boxed{2^{10}}", None),
        ("x86", None),
    ],
)
def test_whole_number_that_is_answered(text: str, value: int | None) -> None:
    assert whole_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("$1,234.50", "1234.50"), ("-0.5", "-0.5"), ("answer is .25", "0.25"), ("3.", "3"), ("18.00", "18")],
)
def test_numbers_with_a_fraction(text: str, value: str) -> None:
    assert number(text) == Decimal(value)


@pytest.mark.parametrize(
    "text", ["(" * 50_000, "\\boxed{" * 3_000, "answer is " * 5_000, "1," * 50_000, "\\text{" * 9_000]
)
def test_hostile_text_is_read_in_a_moment(text: str) -> None:
    """Quadratic work takes minutes at these sizes."""
    choice_letter(text, "ABCD")
    number(text)
