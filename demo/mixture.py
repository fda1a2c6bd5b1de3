"""What training sees: openings, conversations behind them, and the tokens that occur in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random

from demo.arithmetic import draw_arithmetic
from demo.conversation import GREETING, draw_formed, draw_small_talk
from demo.conversation import draw_form as draw_instruction
from demo.extraction import draw_extraction
from demo.extraction import draw_form as draw_schema
from demo.sample import CUT, UNKNOWN, Opening, Sample, encode_answer, is_held_out, plain
from demo.text import draw_text
from demo.tools import declare, draw_call, toolset_key
from demo.words import spelled_words, values
from harmonium.finetune.rows import Row, fill_row
from harmonium.harmony.messages import REASONING_EFFORTS, ReasoningEffort
from harmonium.harmony.vocabulary import vocabulary


@dataclass(frozen=True)
class Shares:
    """rows: of the kinds of openings. plain: of the skills behind an empty opening. sums: of adding,
    subtracting and multiplying. is_wide: see words.draw_value. without_tool: of questions that no
    declared tool is for.
    """

    rows: Mapping[str, float]
    plain: Mapping[str, float]
    sums: tuple[float, float, float] = (4, 4, 3)
    is_wide: bool = True
    without_tool: float = 0.25


EVEN = Shares(
    {"plain": 0.42, "tools": 0.30, "schema": 0.17, "form": 0.11},
    {"arithmetic": 0.43, "text": 0.43, "small talk": 0.14},
)
PHASES = (
    (0, replace(EVEN, rows={"plain": 1.0})),
    (500, EVEN),
    (
        1500,
        Shares(
            {"plain": 0.46, "tools": 0.32, "schema": 0.14, "form": 0.08},
            {"arithmetic": 0.45, "text": 0.48, "small talk": 0.07},
            sums=(3, 3, 4),
        ),
    ),
    (
        2600,
        Shares(
            {"plain": 0.47, "tools": 0.38, "schema": 0.09, "form": 0.06},
            {"arithmetic": 0.50, "text": 0.44, "small talk": 0.06},
            sums=(2, 2, 5),
        ),
    ),
)
"""(first step, shares). Short openings first; later there is more of what is learned last."""
ROW_KINDS = tuple(EVEN.rows)
_BESIDE_TOOLS = 0.15
_TWO_TURNS = 0.1
_WITH_INSTRUCTIONS = 0.15
_INSTRUCTIONS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are an assistant.",
    "You are a bot.",
    "Be polite.",
    "Be helpful and brief.",
    "You help people.",
    "Answer the question.",
    "Answer correctly.",
    f"You are a{UNKNOWN}.",
    f"You are{UNKNOWN * 3}.",
    f"You{UNKNOWN * 5}.{UNKNOWN * 4}.",
    f"{UNKNOWN * 6}",
)
"""Such as ask nothing of the form of an answer."""

Draw = Callable[[], Sample]


def draw_opening(
    random: Random,
    kind: str,
    held_out: bool,
    effort: ReasoningEffort | None = None,
    shares: Shares = EVEN,
) -> tuple[Opening, Draw]:
    """An opening of this kind, and what draws the conversations that may follow it."""
    chosen = effort or random.choice(REASONING_EFFORTS)
    return _opening(random, kind, held_out, chosen, shares)


def _opening(
    random: Random, kind: str, held_out: bool, effort: ReasoningEffort, shares: Shares
) -> tuple[Opening, Draw]:
    day = f"{random.randint(2024, 2029)}-{random.randint(1, 12):02d}-{random.randint(1, 28):02d}"
    opening = Opening(effort, None if random.random() < 0.05 and not held_out else day)
    if kind == "plain":
        if random.random() < _WITH_INSTRUCTIONS and not held_out:
            opening = replace(opening, instructions=random.choice(_INSTRUCTIONS))
        return opening, lambda: draw_plain(random, effort, shares)
    if kind == "form":
        form = draw_instruction(random)
        return replace(opening, instructions=form.text), lambda: draw_formed(random, effort, form)
    if kind == "schema":
        while True:
            schema = draw_schema(random)
            if is_held_out(schema.key) == held_out:
                break
        return (
            replace(opening, response_format=schema.response_format()),
            lambda: draw_extraction(random, effort, schema, shares.is_wide and not held_out),
        )
    while True:
        tools = declare(random)
        if is_held_out(toolset_key(tools)) == held_out:
            break

    def draw() -> Sample:
        if random.random() < _BESIDE_TOOLS and not held_out:
            return draw_plain(random, effort, shares)
        return draw_call(random, effort, tools, shares.without_tool, shares.is_wide and not held_out)

    return replace(opening, tools=tuple(tool.tool() for tool in tools)), draw


def draw_plain(random: Random, effort: str, shares: Shares) -> Sample:
    skill = random.choices(tuple(shares.plain), tuple(shares.plain.values()))[0]
    if skill == "arithmetic":
        return draw_arithmetic(random, effort, shares.sums)
    return draw_text(random, effort) if skill == "text" else draw_small_talk(random, effort)


def shares_at(step: int) -> Shares:
    """Those of the phase that the step is in."""
    return [shares for first, shares in PHASES if first <= step][-1]


def is_on_side(sample: Sample, held_out: bool) -> bool:
    """Training: no key is held out. Held-out items: every key is."""
    sides = [is_held_out(key) for key in sample.keys]
    return bool(sides) and all(sides) if held_out else not any(sides)


def one_side(random: Random, draw: Draw, held_out: bool) -> Iterator[Sample]:
    """Endless samples of one side of the split, some with a turn before them."""
    before: Sample | None = None
    while True:
        sample = draw()
        if not is_on_side(sample, held_out):
            continue
        if before is not None and before.call is None and not held_out and random.random() < _TWO_TURNS:
            # A client sends the text back, which is tokenized anew; a chat replays the tokens.
            answer = before.final if random.random() < 0.5 else plain(before.final)
            yield replace(sample, earlier=((before.question, answer),))
        else:
            yield sample
        before = sample


def draw_row(
    random: Random, length: int, held_out: bool = False, kind: str | None = None, shares: Shares = EVEN
) -> Row:
    """A row of this many tokens, padded. kind: None: any, by the shares."""
    kind = kind or random.choices(tuple(shares.rows), tuple(shares.rows.values()))[0]
    opening, draw = draw_opening(random, kind, held_out, shares=shares)
    return fill_row(opening.ids(), (sample.pieces() for sample in one_side(random, draw, held_out)), length)


def used_tokens(seed: int = 7, num_openings: int = 6000) -> list[int]:
    """The tokens that have a row of their own, ascending: drawn from the generator."""
    random = Random(seed)
    seen: set[int] = set()
    for _ in range(num_openings):
        kind = random.choice(ROW_KINDS)
        opening, draw = draw_opening(random, kind, random.random() < 0.5)
        seen.update(opening.ids())
        for _ in range(4):
            for ids, _ in draw().pieces():
                seen.update(ids)
    words = [*spelled_words(), *(word for listed in values().values() for word in listed), *GREETING.values()]
    numbers = [str(number) for number in range(1000)] + [f"{number:02d}" for number in range(100)]
    for text in (*words, *(f" {word}" for word in words), *numbers):
        seen.update(encode_answer(text))
    seen.difference_update(vocabulary().encode(UNKNOWN), vocabulary().encode(CUT))
    return sorted(seen)
