"""Three laws of the parser on random and mutated streams: it is total, chunks do not matter, a turn replays.

The plain run takes 4,000 streams; `-m slow` takes 100,000.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from harmonium.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    END_OF_TEXT,
    MESSAGE,
    NUM_TEXT_TOKENS,
    RETURN,
    SPECIAL_TOKENS,
    START,
    Message,
    ParsedTurn,
    StreamParser,
    TextDelta,
    parse,
    render_message,
    render_messages,
    vocabulary,
)
from harmonium.harmony.parse import collect
from tests.harmony.conversations import load_encoding

Convert = Callable[[str], list[int]]

NUM_STREAMS = 4_000
SPECIALS = [START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL, END_OF_TEXT, 199_998, 200_018]
BAD_IDS = [-1, 201_088, 1 << 40, -(1 << 70)]
HEADER_TEXTS = [
    "assistant",
    "analysis",
    "commentary",
    "final",
    " to=functions.f",
    " to=browser.search",
    " to=user",
    " ",
    "json",
    " code",
    "functions.f",
    "bash",
    "user",
    "to=",
    " to=",
    "\n",
]


def body_words() -> list[str]:
    """Words of one token each that no header contains; a stream uses each once at most."""
    ids = (token_id for token_id in range(2_000, 60_000))
    texts = ((token_id, vocabulary().token_bytes(token_id)) for token_id in ids)
    words = [
        text.decode()
        for _, text in texts
        if text[:1] == b" " and len(text) > 5 and text[1:].isalpha() and text.isascii()
    ]
    header = " ".join(HEADER_TEXTS)
    unique = {word.strip() for word in words if word.strip() not in header}
    kept: list[str] = []
    for word in sorted(unique, key=lambda word: (-len(word), word)):
        if len(kept) < 400 and not any(word in other or other in word for other in kept):
            kept.append(word)
    return [f" {word}" for word in kept]


class Streams:
    """Makes token streams. Well-formed turns, their mutations, and soups of parts."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._words = body_words()
        self._left: list[str] = []

    def make(self) -> list[int]:
        self._left = self.rng.sample(self._words, 60)
        pick = self.rng.random()
        if pick < 0.1:
            return self._turn()
        if pick < 0.6:
            return self._mutated(self._turn())
        if pick < 0.9:
            return [token for _ in range(self.rng.randint(0, 25)) for token in self._part()]
        return [self.rng.randrange(NUM_TEXT_TOKENS + 20) for _ in range(self.rng.randint(0, 30))]

    def body(self) -> list[int]:
        if len(self._left) < 4:
            return []
        return vocabulary().encode("".join(self._left.pop() for _ in range(self.rng.randint(0, 4))))

    def _turn(self) -> list[int]:
        encode, rng = vocabulary().encode, self.rng
        ids: list[int] = []
        for number in range(rng.randint(1, 4)):
            if number:
                ids += [END, START, *encode("assistant")]
            channel = rng.choice(["analysis", "commentary", "final"])
            recipient = rng.choice(
                ["functions.f", "functions.get_weather", "browser.search", "python", "ask"]
            )
            if rng.random() < 0.4:
                order = rng.random()
                to = encode(f" to={recipient}")
                ids += [*to, CHANNEL, *encode(channel)] if order < 0.3 else [CHANNEL, *encode(channel), *to]
                ids += rng.choice(
                    [
                        [],
                        [*encode(" "), CONSTRAIN, *encode("json")],
                        encode(" code"),
                        [CONSTRAIN, *encode("json")],
                    ]
                )
            else:
                ids += [CHANNEL, *encode(channel)]
            ids += [MESSAGE, *self.body()]
        return [*ids, rng.choice([RETURN, CALL, END])]

    def _part(self) -> list[int]:
        pick = self.rng.random()
        if pick < 0.5:
            return [self.rng.choice(SPECIALS)]
        if pick < 0.75:
            return vocabulary().encode(self.rng.choice(HEADER_TEXTS))
        if pick < 0.97:
            return self.body()
        return [self.rng.choice(BAD_IDS)]

    def _mutated(self, ids: list[int]) -> list[int]:
        rng = self.rng
        for _ in range(rng.randint(1, 4)):
            place = rng.randint(0, len(ids))
            pick = rng.random()
            if pick < 0.35:
                ids = ids[:place] + ids[place + 1 :]
            elif pick < 0.75:
                ids = ids[:place] + self._part() + ids[place:]
            elif pick < 0.85 and place < len(ids) and ids[place] >= NUM_TEXT_TOKENS:
                ids = [*ids[:place], ids[place], *ids[place:]]
            elif pick < 0.95:
                ids = ids[: max(1, place)]
            elif len(ids) > 1:
                other = rng.randrange(len(ids))
                place = min(place, len(ids) - 1)
                ids[place], ids[other] = ids[other], ids[place]
        return ids


def shown(turn: ParsedTurn) -> str:
    """All text that a turn shows anywhere, each place once."""
    parts = [turn.reasoning, turn.content, *(call.arguments for call in turn.tool_calls)]
    parts += [diagnostic.text for diagnostic in turn.diagnostics]
    for message in turn.messages:
        parts += [message.channel or "", message.recipient or "", message.content_type or ""]
    return "\n".join(parts)


def check_total(ids: list[int], turn: ParsedTurn, words: Counter[int]) -> None:
    """P1. words: body words by token id."""
    text = shown(turn)
    for token_id in ids:
        if words[token_id]:
            word = vocabulary().token_bytes(token_id).decode().strip()
            assert text.count(word) == 1, (word, text)
    spelled = "".join(vocabulary().decode([i]) if 0 <= i < NUM_TEXT_TOKENS else "" for i in ids)
    for place in (turn.reasoning, turn.content, *(call.arguments for call in turn.tool_calls)):
        assert "<|" not in place or "<|" in spelled
    assert all("<|" not in call.name or "<|" in spelled for call in turn.tool_calls)
    assert turn.stopped_by


def check_chunks(ids: list[int], turn: ParsedTurn, rng: random.Random) -> None:
    """P2: in chunks, and as a client that joins the pieces sees it."""
    parser = StreamParser()
    events = []
    place = 0
    while place < len(ids):
        size = rng.choice([1, 2, 3, 20])
        events += parser.push_many(ids[place : place + size])
        place += size
    events += parser.finish("length")
    assert collect(events, parser.stopped_by) == turn
    for kind, whole in (("reasoning", turn.reasoning), ("content", turn.content)):
        pieces = [event for event in events if isinstance(event, TextDelta) and event.kind == kind]
        assert "".join(piece.separator + piece.text for piece in pieces) == whole
        assert all(piece.text for piece in pieces)


def check_replay(ids: list[int], turn: ParsedTurn) -> None:
    """P3: a clean turn renders to its own tokens; whatever is rendered parses to the same, cleanly."""
    assistant = vocabulary().encode("assistant")
    if not turn.diagnostics and turn.stopped_by in ("return", "call"):
        is_bare_stop = len(ids) > 1 and ids[-2] == END
        written = [END if token_id == RETURN else token_id for token_id in ids[: len(ids) - is_bare_stop]]
        assert render_messages(turn.messages) == [START, *assistant, *written]
    for message in turn.messages:
        rendered = render_message(message)
        assert rendered[: 1 + len(assistant)] == [START, *assistant]
        again = parse(rendered[1 + len(assistant) :])
        assert [without_ids(other) for other in again.messages] == [without_ids(message)], message
        assert [diagnostic.code for diagnostic in again.diagnostics] == []


def without_ids(message: Message) -> tuple[object, ...]:
    return (message.channel, message.recipient, message.content_type, message.content)


def streams(count: int, seed: int) -> Iterator[tuple[Streams, list[int]]]:
    maker = Streams(random.Random(seed))
    for _ in range(count):
        yield maker, maker.make()


def check_laws(count: int, seed: int) -> Counter[str]:
    """Check the laws on `count` streams; give how often each diagnostic came up."""
    words = Counter(vocabulary().encode(word)[0] for word in body_words())
    seen: Counter[str] = Counter()
    for maker, ids in streams(count, seed):
        turn = parse(ids, "length")
        seen.update({diagnostic.code for diagnostic in turn.diagnostics} or {"clean"})
        check_total(ids, turn, words)
        check_chunks(ids, turn, maker.rng)
        check_replay(ids, turn)
    return seen


def test_laws_hold_on_random_and_mutated_streams() -> None:
    seen = check_laws(NUM_STREAMS, seed=1)
    assert seen["clean"] > NUM_STREAMS / 20
    assert len(seen) > 15, seen


@pytest.mark.slow
def test_laws_hold_on_a_hundred_thousand_streams() -> None:
    assert check_laws(100_000, seed=2)["clean"] > 5_000


def library_messages(oss: object, ids: list[int]) -> list[tuple[object, ...]] | None:
    """What the Harmony library reads, forgiving; None where it raises."""
    encoding = load_encoding(oss)
    try:
        messages = encoding.parse_messages_from_completion_tokens(ids, oss.Role.ASSISTANT, strict=False)  # type: ignore[attr-defined]
    except oss.HarmonyError:  # type: ignore[attr-defined]
        return None
    return [
        (m.channel, m.recipient, m.content_type, "".join(part.text for part in m.content)) for m in messages
    ]


def check_against_library(count: int, seed: int) -> tuple[int, int, int]:
    """(clean turns compared, of malformed ones compared, raised by the library)."""
    oss = pytest.importorskip("openai_harmony", reason="the Harmony library (test extra) is the oracle")
    clean = malformed = raised = 0
    for _, ids in streams(count, seed):
        ids = [token_id for token_id in ids if 0 <= token_id < 201_088]
        stop = next((place for place, token_id in enumerate(ids) if token_id in (RETURN, CALL)), len(ids) - 1)
        ids = ids[: stop + 1]
        turn = parse(ids)
        theirs = library_messages(oss, ids)
        if theirs is None:
            raised += 1
        elif any(message.content_type and not message.recipient for message in turn.messages):
            continue  # a lone word behind the channel: a content type for us, a recipient for the library
        elif not turn.diagnostics:
            clean += 1
            assert [without_ids(message) for message in turn.messages] == theirs, vocabulary().decode(ids)
        elif {diagnostic.code for diagnostic in turn.diagnostics} == {"missing_message"}:
            ours = ["".join(message.content.split()) for message in turn.messages]
            texts = ["".join(str(text).split()) for *_, text in theirs]
            assert len(ours) >= len(texts), (
                "the library loses a header without <|message|> after the first message"
            )
            if len(ours) == len(texts) and not vocabulary().decode(ids).lstrip().startswith("assistant"):
                malformed += 1
                assert all(mine in text for mine, text in zip(ours, texts, strict=True)), vocabulary().decode(
                    ids
                )
    return clean, malformed, raised


def test_clean_turns_read_as_the_library_reads_them() -> None:
    clean, malformed, raised = check_against_library(3_000, seed=3)
    assert clean > 250
    assert malformed > 5
    assert raised > 500


def test_no_special_token_is_named_like_text() -> None:
    assert all(name.startswith("<|") for name in SPECIAL_TOKENS.values())
