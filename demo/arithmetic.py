"""Sums, differences and products, worked out digit by digit in the analysis."""

from __future__ import annotations

from random import Random

from demo.sample import CUT, Sample

COLUMNS = ("ones", "tens", "hundreds")
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}

_OPENINGS = (
    "What is {}?",
    "What's {}?",
    "How much is {}?",
    "Calculate {}.",
    "Compute {}.",
    "Work out {}.",
    "{}",
    "{} =",
    "{} = ?",
    "{}?",
    "Please calculate {}.",
    "Can you compute {}?",
    "Tell me {}.",
    "What does {} give?",
    "Solve {}",
    "what is {}",
    "Find {}.",
    "I need to know {}.",
    "Please tell me what {} is.",
    "Give me the result of {}.",
)
_FORMS = {
    "add": ("{a} + {b}", "{a}+{b}", "{a} plus {b}", "the sum of {a} and {b}", "{b} added to {a}"),
    "subtract": ("{a} - {b}", "{a}-{b}", "{a} minus {b}", "{b} subtracted from {a}", "{a} take away {b}"),
    "multiply": (
        "{a} * {b}",
        "{a}*{b}",
        "{a} times {b}",
        "the product of {a} and {b}",
        "{a} x {b}",
        "{a} × {b}",  # noqa: RUF001
        "{a} multiplied by {b}",
    ),
}
_WHOLE = {
    "add": (
        "Add {a} and {b}.",
        "Add {b} to {a}.",
        "I have {a} {things} and get {b} more. How many {things} do I have?",
        "There are {a} {things} here and {b} {things} there. How many in all?",
        "Please add {a} and {b}.",
    ),
    "subtract": (
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "I have {a} {things} and give away {b}. How many {things} are left?",
        "What is left of {a} after {b} are gone?",
    ),
    "multiply": (
        "Multiply {a} by {b}.",
        "Multiply {a} and {b}.",
        "There are {a} boxes with {b} {things} each. How many {things} in all?",
    ),
}
_THINGS = ("apples", "books", "coins", "cards", "eggs", "cars", "stars", "trees", "birds", "balls")


def draw_arithmetic(random: Random, effort: str, shares: tuple[float, float, float] = (4, 4, 3)) -> Sample:
    """shares: of adding, subtracting and multiplying."""
    kind = random.choices(("add", "subtract", "multiply"), shares)[0]
    a, b = _operands(random, kind)
    question, wording = _question(random, kind, a, b)
    if kind == "multiply" and a < b:
        a, b = b, a  # the working goes through the digits of the longer one
    sign = _SIGNS[kind]
    result = {"add": a + b, "subtract": a - b, "multiply": a * b}[kind]
    analysis = working(a, sign, b, effort)
    return Sample("arithmetic", question, analysis, str(result), (f"{a}{sign}{b}", wording))


def _operands(random: Random, kind: str) -> tuple[int, int]:
    if kind == "multiply":
        a, b = random.randint(0, 99), random.randint(0, 9)
        return (a, b) if random.random() < 0.7 else (b, a)
    a, b = (random.randrange(10 ** random.choice((1, 2, 2, 3, 3, 3, 3))) for _ in range(2))
    if kind == "subtract" and a < b and random.random() < 0.6:
        a, b = b, a
    return a, b


def _question(random: Random, kind: str, a: int, b: int) -> tuple[str, str]:
    """The question, and its wording: the same for any operands."""
    if random.random() < 0.25:
        template = random.choice(_WHOLE[kind])
    else:
        form = random.choice(_FORMS[kind])
        template = random.choice(_OPENINGS).format(form)
        if template[0] == "t":
            template = "T" + template[1:]
    return template.format(a=a, b=b, things=random.choice(_THINGS)), template


def working(a: int, sign: str, b: int, effort: str) -> str:
    """The expression, then a line for each column: digit, digit, carry, and what they make."""
    head = f"{a}{sign}{b}"
    if sign == "-" and a < b:
        head += f"\n-({b}-{a})"
        a, b = b, a
    if effort == "low":
        return "\n".join([head, *_lines(a, sign, b, is_short=True)])
    lines = _lines(a, sign, b)
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    named = [f"{column} {line}" for column, line in zip(COLUMNS, lines, strict=False)]
    steps = [head, *named, split_number(result)]
    if effort == "high":
        steps += ["check", *_check(a, sign, b, result)]
    return "\n".join(steps)


def _check(a: int, sign: str, b: int, result: int) -> list[str]:
    """The same columns once more, the operands the other way round where that makes no difference."""
    if sign == "-":
        return [f"{result}+{b}", *_lines(result, "+", b), str(a)]
    first, second = (b, a) if sign == "+" else (a, b)
    return [f"{first}{sign}{second}", *_lines(first, sign, second), str(result)]


def split_number(number: int) -> str:
    return CUT + str(number) + CUT


def _lines(a: int, sign: str, b: int, is_short: bool = False) -> list[str]:
    """A line a column. is_short: product and carry in one step, which is harder."""
    if sign == "*":
        return _product_lines(a, b, is_short)
    lines, carry = [], 0
    for column in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**column % 10, b // 10**column % 10
        if sign == "+":
            total = x + y + carry
            lines.append(f"{x}+{y}+{carry}={total}")
            carry = total // 10
        else:
            borrow = x < y + carry
            x += 10 * borrow
            lines.append(f"{x}-{y}-{carry}={x - y - carry}")
            carry = int(borrow)
    return lines


def _product_lines(a: int, b: int, is_short: bool) -> list[str]:
    lines, carry = [], 0
    for column in range(len(str(a))):
        x = a // 10**column % 10
        total = x * b + carry
        lines.append(f"{x}*{b}+{carry}={total}" if is_short else f"{x}*{b}={x * b}+{carry}={total}")
        carry = total // 10
    return lines
