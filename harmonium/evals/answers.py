r"""Finding the answer in a text: an option's letter, a whole number, any number.

Looked for in this order: the last `\boxed{...}` (or `\fbox`), the last "answer: X" or "answer is X" (for
numbers also GSM8K's "#### X"), and, as the last resort, what the text ends with. The reasoning is never
looked at. A text that names two answers in the place where one is expected has none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathsf|textrm|operatorname)\s*\{([^{}]*)\}")
_ANSWER = (
    r"\banswer(?:\s+choice|\s+option)?\b[\s*_`\"']*(?:is|are|:|=|should be|would be|must be)[\s*_`\"':]*"
)
_OPTION = r"(?:the\s+)?(?:(?:option|choice|letter)\s*)?"
# Letters after which a sentence goes on are an article ("a mixture") or a name; those before an ending are
# not.
_ENDING = r"(?=\s*(?:[.,;:!?)\]}*_`$\"'\\]|$|\n|\b(?:because|since|as)\b|[-\u2013\u2014]))"
_NUMBER = re.compile(
    r"(?<![\w.])[-\u2212+]?\$?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-\u2212]?\.\d+"
)
_NUMBER_ANSWER = re.compile(r"(?:" + _ANSWER + r"|^\s*####)\s*(?P<rest>[^\n]*)", re.IGNORECASE | re.MULTILINE)


def boxed(text: str) -> str | None:
    r"""Inside of the last complete \boxed{...}, braces matched; None for none. Linear."""
    starts = {match.end() for match in _BOX.finditer(text)}
    if not starts:
        return None
    open_braces: list[int] = []  # places behind each brace that is open
    last = None
    for place, character in enumerate(text):
        if character == "{":
            open_braces.append(place + 1)
        elif character == "}" and open_braces:
            start = open_braces.pop()
            if start in starts and (last is None or start > last[0]):
                last = (start, place)
    return text[last[0] : last[1]] if last is not None else None


def choice_letter(text: str, letters: str) -> str | None:
    """The option that the text chooses, as a capital of `letters` ("ABCD"); None where it chooses none."""
    text = unicodedata.normalize("NFKC", text)
    box = boxed(text)
    if box is not None:
        return _only_letter(_unwrapped(box), letters)
    named = list(_named_letters(_unwrapped(text), letters))
    if named:
        return named[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # An answer stands alone at the end or at the beginning; a list of the options is none.
    is_list = len({letter for line in lines if (letter := _line_letter(line, letters)) is not None}) > 1
    for line in lines[-1:] + lines[:1]:
        letter = _lone_letter(line, letters) or (None if is_list else _line_letter(line, letters))
        if letter is not None:
            return letter
    marked = set(re.findall(rf"\(([{letters}])\)", text))
    return marked.pop() if len(marked) == 1 else None


def _named_letters(text: str, letters: str) -> Iterator[str]:
    pattern = rf"{_ANSWER}{_OPTION}[\s*_`$(\[{{\"'\\]*([{letters}{letters.lower()}]){_ENDING}"
    second = re.compile(rf"[\s)*\].]*(?:or|and|/|,|&)\s*[(*\[]*[{letters}]\b", re.IGNORECASE)
    ends = re.compile(r"\s*(?:[).\]]|$|\n)")
    for match in re.finditer(pattern, text, re.IGNORECASE):
        letter = match[1]
        if second.match(text, match.end()):
            continue
        if letter.islower() and not ends.match(text, match.end()):
            continue  # "the answer is a, well, long story"
        yield letter.upper()


def _lone_letter(line: str, letters: str) -> str | None:
    bare = line.strip(" *_`$()[]{}\"'.:\\")
    return bare.upper() if len(bare) == 1 and bare.upper() in letters else None


def _line_letter(line: str, letters: str) -> str | None:
    """The letter that begins the line as an option's does, and is the only one it marks."""
    match = re.match(rf"^[\s*_`(\[]*([{letters}])[\s*_`]*[).:\]]", line)
    if match is None or len({match[1], *re.findall(rf"\(([{letters}])\)", line)}) > 1:
        return None
    return match[1]


def _only_letter(text: str, letters: str) -> str | None:
    match = re.match(rf"^(?:option|choice|answer)?[\s:]*[(]?([{letters}])[).:]", text.strip(), re.IGNORECASE)
    return _lone_letter(text, letters) or (match[1].upper() if match else None)


def whole_number(text: str) -> int | None:
    """The answer as a whole number, of any size; None for none, and for "1/2" or "2.5"."""
    value = number(text)
    return int(value) if value is not None and value == value.to_integral_value() else None


def number(text: str) -> Decimal | None:
    """The answer as a number: signs, thousands separators, currency and units aside."""
    text = _latex_numbers(unicodedata.normalize("NFKC", text))
    box = boxed(text)
    if box is not None:
        return _one_number(_unwrapped(box))
    named = [match["rest"] for match in _NUMBER_ANSWER.finditer(text)]
    if named:
        value = _one_number(_unwrapped(named[-1]))
        if value is not None:
            return value
    found = _numbers(_unwrapped(text))
    return found[-1] if found else None


def _one_number(text: str) -> Decimal | None:
    """The number in a short text. What stands before the last "=" is how it was found."""
    text = text.rsplit("=", 1)[-1]
    if re.search(r"\\[dt]?frac|\\sqrt|\\pi\b|\d\s*/\s*\d|\^", text):
        return None
    found = _numbers(text)
    return found[0] if len(set(found)) == 1 or (found and _is_led_by_number(text)) else None


def _is_led_by_number(text: str) -> bool:
    """ "18 eggs (2 boxes of 9)": the first number is the answer; "2 or 3" has none."""
    if re.search(r"\bor\b|\band\b|\bto\b|,\s", text):
        return False
    return re.match(r"[\s*_`$(\\\[]*[-\u2212+]?\$?\s?\.?\d", text) is not None


def _numbers(text: str) -> list[Decimal]:
    found = []
    for match in _NUMBER.finditer(text):
        plain = re.sub(r"[\s,$+]", "", match[0]).replace("\u2212", "-")
        try:
            found.append(Decimal(plain))
        except InvalidOperation:
            continue
    return found


def _latex_numbers(text: str) -> str:
    r"""Thousands as LaTeX writes them, 1{,}234 and 1\,234, as 1,234; \$ and \% without the stroke."""
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!,|,\\!)(?=\d{3})", ",", text)
    return text.replace("\\$", "$").replace("\\%", "%").replace("\\!", "").replace("\u00a0", " ")


def _unwrapped(text: str) -> str:
    while True:
        inner = _WRAPPED.sub(r"\1", text)
        if inner == text:
            return text
        text = inner
