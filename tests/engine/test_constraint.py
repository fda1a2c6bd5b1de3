"""Constraints over the fake model, which knows 97 tokens; its choice is taken to the next one allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.engine import LocalEngine, Request
from harmonium.model.batch import Batch, SamplingParams
from tests.engine.fake_runner import VOCABULARY_SIZE, FakeRunner
from tests.engine.serving import check_empty, collect, make_engine, prompt_of

WORDS = -(-VOCABULARY_SIZE // 32)
STOP = 96


def mask_of(*token_ids: int) -> npt.NDArray[np.uint32]:
    mask = np.zeros(WORDS, np.uint32)
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return mask


@dataclass
class Row:
    """One place of a pattern. choices: tokens that may come; one: it is forced, unless is_sampled."""

    choices: tuple[int, ...]
    is_sampled: bool = False


@dataclass
class PatternState:
    """Follows a list of rows, then it is complete. fails_at: place whose call of that name raises."""

    rows: AnySequence[Row]
    fails_at: tuple[str, int] | None = None
    place: int = 0
    masks: list[int] = field(default_factory=list)

    def _check(self, name: str) -> None:
        if self.fails_at == (name, self.place):
            raise ValueError(f"{name} fails at {self.place}")

    @property
    def is_complete(self) -> bool:
        return self.place >= len(self.rows)

    def mask(self) -> npt.NDArray[np.uint32]:
        self._check("mask")
        self.masks.append(self.place)
        return mask_of(*self.rows[self.place].choices)

    def forced_tokens(self) -> list[int]:
        self._check("forced")
        forced = []
        for row in self.rows[self.place :]:
            if len(row.choices) != 1 or row.is_sampled:
                break
            forced.append(row.choices[0])
        return forced

    def advance(self, token_id: int) -> None:
        self._check("advance")
        assert token_id in self.rows[self.place].choices
        self.place += 1

    def rollback(self, num_tokens: int) -> None:
        self.place -= num_tokens

    def copy(self) -> PatternState:
        return PatternState(self.rows, self.fails_at, self.place)


class Pattern:
    """A constraint of rows. states: of every answer that was started."""

    def __init__(self, *rows: Row, fails_at: tuple[str, int] | None = None) -> None:
        self.rows = rows
        self.fails_at = fails_at
        self.states: list[PatternState] = []

    def start(self) -> PatternState:
        if self.fails_at == ("start", 0):
            raise ValueError("start fails")
        self.states.append(PatternState(self.rows, self.fails_at))
        return self.states[-1]


def any_of(*token_ids: int) -> Row:
    return Row(token_ids)


def just(token_id: int) -> Row:
    return Row((token_id,))


PATTERN = (
    just(3),
    just(4),
    any_of(5, 6),
    any_of(7, 8, 9),
    just(10),
    just(11),
    any_of(12, 13),
    just(14),
    just(STOP),
)


class MaskedRunner(FakeRunner):
    """Obeys masks: its choice becomes the first allowed token from there on."""

    def _step(self, batch: Batch):  # type: ignore[no-untyped-def]
        result = super()._step(batch)
        tokens = []
        for token, row in zip(result.tokens, batch.sampling, strict=True):
            if token is not None and row is not None and row.allowed_mask is not None:
                allowed = np.flatnonzero(np.unpackbits(row.allowed_mask.view(np.uint8), bitorder="little"))
                chosen = int(min(allowed[allowed >= token.token_id], default=allowed[0]))
                token = type(token)(chosen, token.logprob, token.top_logprobs)
            tokens.append(token)
        return type(result)(tuple(tokens), result.logits_RV)


def request(constraint: Pattern, prompt: AnySequence[int] = (1, 2), **params: object) -> Request:
    sampling = SamplingParams(temperature=0, **params)  # type: ignore[arg-type]
    return Request("r", tuple(prompt), sampling, frozenset({STOP}), constraint=constraint)


def run(engine: LocalEngine, *requests: Request) -> list[tuple[list[int], str | None, str | None]]:
    """(tokens, finish reason, error) of each, sent at once; every block must have been given back."""

    async def answers() -> list[tuple[list[int], str | None, str | None]]:
        try:
            found = await asyncio.gather(*(collect(engine, request) for request in requests))
        finally:
            await engine.close()
            check_empty(engine)
        return [
            (
                [t.token_id for event in events for t in event.tokens],
                events[-1].finish_reason,
                events[-1].error,
            )
            for events in found
        ]

    return asyncio.run(answers())


def test_answer_keeps_to_the_masks_and_ends_at_a_forced_stop_token() -> None:
    runner = MaskedRunner()
    tokens, reason, error = run(make_engine(runner), request(Pattern(*PATTERN)))[0]
    assert all(token in row.choices for token, row in zip(tokens, PATTERN, strict=True))
    assert (reason, error) == ("stop", None)


def test_forced_tokens_take_no_step_of_their_own() -> None:
    runner = MaskedRunner()
    run(make_engine(runner), request(Pattern(*PATTERN), prompt_of(20)))
    assert [len(batch.token_id_T) for batch in runner.batches] == [22, 1, 3]
    assert all(batch.sampling[0].allowed_mask is not None for batch in runner.batches if batch.sampling[0])


def test_answer_ends_when_the_constraint_is_complete_without_a_stop_token() -> None:
    assert run(make_engine(MaskedRunner()), request(Pattern(any_of(5, 6), just(7))))[0][1:] == ("stop", None)
    assert run(make_engine(MaskedRunner()), request(Pattern()))[0] == ([], "stop", None)
    assert run(make_engine(MaskedRunner()), request(Pattern(just(5), just(STOP))))[0] == (
        [5, STOP],
        "stop",
        None,
    )


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_forced_tokens_stop_at_max_tokens(max_tokens: int) -> None:
    whole = run(make_engine(MaskedRunner()), request(Pattern(*PATTERN)))[0][0]
    engine = make_engine(MaskedRunner())
    assert run(engine, request(Pattern(*PATTERN), max_tokens=max_tokens))[0] == (
        whole[:max_tokens],
        "length",
        None,
    )
    assert engine.statistics.num_answer_tokens + engine.statistics.num_forced_tokens == max_tokens


def test_forced_tokens_have_log_probability_0_where_they_were_asked_for() -> None:
    async def tokens() -> list[tuple[int, float | None, tuple[tuple[int, float], ...]]]:
        engine = make_engine(MaskedRunner())
        events = await collect(engine, request(Pattern(just(3), any_of(5, 6), just(STOP)), logprobs=1))
        await engine.close()
        return [(t.token_id, t.logprob, t.top_logprobs) for event in events for t in event.tokens]

    first, chosen, last = asyncio.run(tokens())
    assert (first, last) == ((3, 0.0, ((3, 0.0),)), (STOP, 0.0, ((STOP, 0.0),)))
    assert chosen[1] == -0.5


@pytest.mark.parametrize("name", ["start", "mask", "advance", "forced"])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_what_a_constraint_raises_ends_its_answer_alone(name: str, place: int) -> None:
    if (name == "start" and place) or (name in ("mask", "advance") and place == 0):
        name, place = "forced", 0
    bad = Pattern(*PATTERN, fails_at=(name, place))
    requests = [request(Pattern(*PATTERN), prompt_of(40, seed)) for seed in range(3)]
    engine = make_engine(MaskedRunner())
    *good, failed = run(engine, *requests, request(bad, prompt_of(40, 9)))
    assert [reason for _, reason, _ in good] == ["stop"] * 3
    assert all(len(tokens) == len(PATTERN) for tokens, _, _ in good)
    assert failed[1] == "error" and failed[2] is not None and failed[2].startswith("ValueError: ")
    assert engine.statistics.finished == {"stop": 3, "error": 1}


def test_preempted_sequence_goes_on_under_its_constraint() -> None:
    rows = [any_of(1, 2, 3) if i % 3 else just(4) for i in range(120)]

    def answers(num_blocks: int) -> tuple[list[list[int]], int]:
        engine = make_engine(MaskedRunner(), context_length=192, num_full_blocks=num_blocks)
        found = run(engine, *(request(Pattern(*rows), prompt_of(30, seed)) for seed in range(4)))
        return [tokens for tokens, _, _ in found], engine.statistics.num_preemptions

    roomy, preemptions = answers(64)
    assert preemptions == 0
    tight, preemptions = answers(9)
    assert preemptions > 0
    assert tight == roomy


def test_constrained_and_free_sequences_share_steps() -> None:
    free = Request("free", tuple(prompt_of(10)), SamplingParams(temperature=0, max_tokens=5))
    alone = run(make_engine(MaskedRunner()), free)[0]
    engine = make_engine(MaskedRunner())
    together = run(engine, free, request(Pattern(*PATTERN)))
    assert together[0] == alone and together[1][1] == "stop"
    assert engine.statistics.constraint_seconds > 0


def test_reader_that_leaves_a_constrained_answer_frees_its_blocks() -> None:
    async def leave() -> LocalEngine:
        engine = make_engine(MaskedRunner(seconds_per_step=0.002))
        rows = [any_of(1, 2)] * 500
        async for _ in (events := engine.generate(request(Pattern(*rows)))):
            break
        await events.aclose()
        await engine.close()
        return engine

    engine = asyncio.run(leave())
    check_empty(engine)
    assert engine.statistics.finished == {"aborted": 1}
