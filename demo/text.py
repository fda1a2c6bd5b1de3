"""Reverse, upper case, count and sort: words are spelled with the number of each letter, then worked on."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from demo.sample import CUT, UNKNOWN, Sample, letter_by_letter
from demo.words import spelled_words

_ASK = (
    "{}",
    "Please {}",
    "Can you {}?",
    "I want you to {}.",
    "Your task: {}",
    "{} please",
    "Now {}.",
    "Could you {}?",
)
_REVERSE = (
    "reverse the word {w}",
    "reverse {w}",
    "spell {w} backwards",
    "write {w} backwards",
    'reverse "{w}"',
    "turn the word {w} around",
    "write the letters of {w} in reverse order",
)
_UPPER = (
    "write {w} in upper case",
    "write the word {w} in capital letters",
    "convert {w} to upper case",
    'put "{w}" in upper case',
    "make {w} upper case",
    "capitalize every letter of {w}",
)
_LENGTH = (
    "count the letters in {w}",
    "count the letters of the word {w}",
    'tell me how many letters "{w}" has',
    "say how many letters are in {w}",
    "find the length of the word {w}",
)
_OCCURRENCES = (
    "count the letter {c} in {w}",
    "tell me how often {c} is in {w}",
    "count how many times {c} appears in {w}",
    "say how many {c} there are in the word {w}",
)
_SORT = (
    "sort {l}",
    "sort these words: {l}",
    "put {l} in alphabetical order",
    "sort the words {l}",
    "order these words from A to Z: {l}",
    "arrange {l} alphabetically",
)
_WORDS = (
    "count the words: {l}",
    "count the words in this list: {l}",
    "tell me how many words these are: {l}",
    "say how many words are here: {l}",
)
_QUESTIONS = {
    "length": (
        "How many letters are in {w}?",
        "How many letters does the word {w} have?",
        "How long is the word {w}?",
    ),
    "occurrences": (
        "How many times does {c} appear in {w}?",
        "How many {c} are in {w}?",
        "How often is the letter {c} in {w}?",
    ),
    "reverse": ("What is {w} backwards?", "What is the reverse of {w}?"),
}


def draw_text(random: Random, effort: str) -> Sample:
    kind = random.choices(tuple(_DRAW), (5, 4, 2, 4, 4, 1.5, 0.7))[0]
    return _DRAW[kind](random, effort)


def _unknown(random: Random, effort: str) -> Sample:
    """A word outside the list: the model cannot know its letters, and says so."""
    kind, requests = random.choice((("reverse", _REVERSE), ("upper", _UPPER), ("length", _LENGTH)))
    wording = _wording(random, kind, requests)
    mark = "\2"
    question = wording.format(w=mark).replace(f" {mark}", mark)
    question = question.replace(mark, UNKNOWN * random.choice((1, 1, 2, 3)))
    lines = {
        "low": ("unknown",),
        "medium": ("The word:", "unknown"),
        "high": ("The word:", "unknown", "no letters"),
    }
    return _sample(
        question, lines[effort], "I do not know the letters of that word.", f"unknown {wording}", wording
    )


def _wording(random: Random, kind: str, requests: tuple[str, ...]) -> str:
    questions = _QUESTIONS.get(kind, ())
    if questions and random.random() < 0.3:
        return random.choice(questions)
    text = random.choice(_ASK).format(random.choice(requests))
    return text[0].upper() + text[1:]


def spelled(word: str, backwards: bool = False) -> str:
    """1s2t3o4n5e, or 5e4n3o2t1s."""
    pairs = [f"{index}{letter}" for index, letter in enumerate(word, 1)]
    return CUT + "".join(reversed(pairs) if backwards else pairs) + CUT


def _reverse(random: Random, effort: str) -> Sample:
    word = random.choice(spelled_words())
    wording = _wording(random, "reverse", _REVERSE)
    backwards = letter_by_letter(word[::-1])
    lines = {
        "low": (spelled(word, True),),
        "medium": (spelled(word), spelled(word, True)),
        "high": (spelled(word), spelled(word, True), f"check{CUT}", spelled(word), spelled(word, True)),
    }[effort]
    return _sample(wording.format(w=word), lines, backwards, f"reverse {word}", wording)


def _upper(random: Random, effort: str) -> Sample:
    word = random.choice(spelled_words())
    wording = _wording(random, "upper", _UPPER)
    capital = letter_by_letter(word.upper())
    lines = {
        "low": (spelled(word),),
        "medium": (spelled(word), spelled(word.upper())),
        "high": (spelled(word), spelled(word.upper()), f"check{CUT}", spelled(word.upper())),
    }[effort]
    return _sample(wording.format(w=word), lines, capital, f"upper {word}", wording)


def _length(random: Random, effort: str) -> Sample:
    word = random.choice(spelled_words())
    wording = _wording(random, "length", _LENGTH)
    lines = {
        "low": (spelled(word),),
        "medium": (spelled(word), str(len(word))),
        "high": (spelled(word), spelled(word, True), str(len(word))),
    }[effort]
    return _sample(wording.format(w=word), lines, str(len(word)), f"length {word}", wording)


def _occurrences(random: Random, effort: str) -> Sample:
    word = random.choice(spelled_words())
    letter = random.choice(word) if random.random() < 0.85 else random.choice("aeioulrst")
    wording = _wording(random, "occurrences", _OCCURRENCES)
    seen, steps = 0, []
    for index, each in enumerate(word, 1):
        seen += each == letter
        steps.append(f"{index}{each}{seen}")
    counted = f"{letter}:{CUT}" + ",".join(steps)
    lines = {
        "low": (counted,),
        "medium": (spelled(word), counted),
        "high": (spelled(word), counted, f"check{CUT}", counted),
    }[effort]
    key = f"occurrences {letter} {word}"
    return _sample(wording.format(w=word, c=letter), lines, str(seen), key, wording)


def _sort(random: Random, effort: str) -> Sample:
    """Words with different first letters, which is all that is looked at."""
    chosen: dict[str, str] = {}
    count = random.choice((3, 3, 4, 4, 5))
    while len(chosen) < count:
        word = random.choice(spelled_words())
        chosen.setdefault(word[0], word)
    words = list(chosen.values())
    wording = _wording(random, "sort", _SORT)
    ordered = sorted(words)
    separator = random.choice((", ", " "))
    with_letter = [f"{word[0]} {word}" for word in words]
    sorted_letters = [f"{word[0]} {word}" for word in ordered]
    lines = {
        "low": (",".join(word[0] for word in words), ",".join(word[0] for word in ordered)),
        "medium": (",".join(with_letter), ",".join(sorted_letters)),
        "high": (",".join(with_letter), ",".join(word[0] for word in ordered), ",".join(sorted_letters)),
    }[effort]
    question = wording.format(l=separator.join(words))
    return _sample(question, lines, ", ".join(ordered), "sort " + " ".join(ordered), wording)


def _words(random: Random, effort: str) -> Sample:
    words = random.sample(spelled_words(), random.randint(2, 7))
    wording = _wording(random, "words", _WORDS)
    counted = "".join(f"{index} {word}" for index, word in enumerate(words, 1))
    answer = str(len(words))
    lines = {"low": (counted,), "medium": (counted, answer), "high": (counted, "check", counted, answer)}[
        effort
    ]
    return _sample(wording.format(l=" ".join(words)), lines, answer, "words " + " ".join(words), wording)


def _sample(question: str, lines: tuple[str, ...], final: str, key: str, wording: str) -> Sample:
    return Sample("text", question, "\n".join(lines), final, (key, wording))


_DRAW: dict[str, Callable[[Random, str], Sample]] = {
    "reverse": _reverse,
    "upper": _upper,
    "length": _length,
    "occurrences": _occurrences,
    "sort": _sort,
    "words": _words,
    "unknown": _unknown,
}
