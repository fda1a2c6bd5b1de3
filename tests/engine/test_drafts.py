"""Guesses ahead change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonium.config import EngineConfig
from harmonium.engine import Request
from harmonium.engine.blocks import PagedCache
from harmonium.engine.drafts import MAX_DRAFT_TOKENS, DraftBudget, PromptLookup, decode_cost
from harmonium.engine.scheduler import Scheduler, build_batch
from harmonium.engine.sequence import Sequence
from harmonium.errors import ConfigError
from harmonium.model.batch import RowSampling, SamplingParams
from tests.engine.fake_runner import FakeRunner, expected_answer, fake_config
from tests.engine.serving import check_empty, collect, make_engine, prompt_of
from tests.engine.test_constraint import STOP, MaskedRunner, Pattern, Row

CONTEXT = 320
COST = decode_cost(fake_config())


@dataclass
class Oracle:
    """Guesses what the fake model will say; each token is wrong with this chance."""

    wrong: float = 0.0
    asked: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(5))

    def propose(self, token_ids: npt.NDArray[np.int32], max_tokens: int) -> npt.NDArray[np.int32]:
        self.asked += 1
        answer = expected_answer(token_ids.tolist(), max_tokens)
        return np.array([(t + 1) % 97 if self.chance.random() < self.wrong else t for t in answer], np.int32)


def lookup_by_hand(tokens: list[int], max_tokens: int) -> list[int]:
    """The longest earlier match of the end, of equally long ones the latest, by trying all."""
    best: tuple[int, int] | None = None
    for end in range(len(tokens) - 1):
        length = 0
        while length < 24 and length <= end and tokens[end - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length >= 3 and (best is None or length >= best[0]):
            best = (length, end)
    return [] if best is None else tokens[best[1] + 1 :][:max_tokens]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 40))
def test_lookup_finds_the_longest_and_latest_match(tokens: list[int], max_tokens: int) -> None:
    proposed = PromptLookup().propose(np.array(tokens, np.int32), max_tokens)
    assert proposed.tolist() == lookup_by_hand(tokens, max_tokens)


def test_lookup_follows_a_quoted_text() -> None:
    text = list(range(200, 260))
    proposed = PromptLookup().propose(np.array([*text, 1, 2, *text[10:14]], np.int32), 31)
    assert proposed.tolist() == text[14:45]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=400), st.integers(1, 16))
def test_wrong_guesses_cost_at_most_two_steps_and_two_percent(tries: list[bool], num_tokens: int) -> None:
    budget, cost, spent, steps = DraftBudget(), COST, 0.0, 0.0
    for is_tried in tries:
        steps += 1
        guessed = budget.allowance(num_tokens, cost) if is_tried else 0
        spent += (cost(num_tokens + guessed) - cost(num_tokens)) / cost(1)
        budget.settle(guessed, 0, num_tokens, cost)
        assert spent <= 2.0 + 0.02 * steps + 1e-9


def test_true_guesses_grow_to_the_most_and_one_wrong_guess_shrinks_them() -> None:
    budget = DraftBudget()
    lengths = []
    for _ in range(8):
        lengths.append(budget.allowance(1, COST))
        budget.settle(lengths[-1], lengths[-1], 1, COST)
    assert lengths == sorted(lengths) and lengths[-1] == MAX_DRAFT_TOKENS
    budget.settle(MAX_DRAFT_TOKENS, 2, 1, COST)
    assert budget.allowance(1, COST) == 3


@dataclass
class Drafted:
    """A scheduler with guesses over the fake model, stepped by hand with the books checked."""

    drafter: Oracle
    num_full: int = 40
    max_batch_tokens: int = 64

    def __post_init__(self) -> None:
        self.cache = PagedCache(
            self.num_full, self.num_full, block_tokens=32, window=40, max_sequences=4, max_tokens=CONTEXT
        )
        self.runner = FakeRunner(40, self.max_batch_tokens)
        self.runner.allocate_cache(self.num_full, self.num_full)
        self.scheduler = Scheduler(self.cache, 4, self.max_batch_tokens, self.drafter, COST)
        self.steps = 0

    def add(self, prompt: list[int], max_tokens: int, **params: float) -> Sequence:
        settings = {"temperature": 0.0, **params}
        request = Request("r", tuple(prompt), SamplingParams(max_tokens=max_tokens, **settings))  # type: ignore[arg-type]
        sequence = Sequence(request, CONTEXT)
        self.scheduler.add(sequence)
        return sequence

    def run(self) -> None:
        while self.scheduler.has_work:
            chunks = self.scheduler.schedule()
            self.cache.check()
            assert sum(chunk.size for chunk in chunks) <= self.max_batch_tokens
            self.scheduler.commit(chunks, self.runner.step(build_batch(chunks, self.cache)))
            self.cache.check()
            self.steps += 1
            assert self.steps < 3000, "sequences starve"
        assert self.cache.full.num_used == self.cache.windowed.num_used == 0


@pytest.mark.parametrize("wrong", [0.0, 0.05, 0.4, 1.0])
def test_answer_is_the_same_with_right_and_wrong_guesses(wrong: float) -> None:
    served = Drafted(Oracle(wrong))
    prompts = [prompt_of(5 + 40 * seed, seed) for seed in range(3)]
    sequences = [served.add(prompt, 150) for prompt in prompts]
    served.run()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.token_ids[len(prompt) :].tolist() == expected_answer(prompt, 150)
    assert served.scheduler.num_draft_tokens > 0
    if wrong == 0.0:
        assert served.steps < 40
        assert served.scheduler.num_accepted_draft_tokens == served.scheduler.num_draft_tokens


def test_guesses_never_take_blocks_from_others() -> None:
    served = Drafted(Oracle(), num_full=12)
    prompts = [prompt_of(30, seed) for seed in range(4)]
    sequences = [served.add(prompt, 200) for prompt in prompts]
    served.run()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.token_ids[len(prompt) :].tolist() == expected_answer(prompt, 200)


def test_sampled_answer_with_penalties_is_the_same() -> None:
    params = SamplingParams(temperature=1.0, seed=3, presence_penalty=1.0, repetition_penalty=1.1)
    prompt = prompt_of(20)

    def answer(wrong: float) -> tuple[list[int], int]:
        served = Drafted(Oracle(wrong))
        sequence = Sequence(
            Request("r", tuple(prompt), SamplingParams(**{**_fields(params), "max_tokens": 120})), CONTEXT
        )
        # The oracle cannot know sampled tokens; let it know this answer's.
        served.drafter.propose = lambda ids, n: np.array(truth[len(ids) - 20 :][:n], np.int32)  # type: ignore[method-assign]
        served.scheduler.add(sequence)
        served.run()
        return sequence.token_ids[20:].tolist(), served.steps

    truth: list[int] = []
    plain, steps = answer(0.0)
    truth = plain
    guessed, fewer = answer(0.0)
    assert guessed == plain and fewer < steps / 3


def _fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in params.__slots__}


def test_rows_behind_a_draft_count_its_tokens_for_penalties() -> None:
    sequence = Sequence(Request("r", (1, 2), SamplingParams(presence_penalty=1.0, seed=1)), 100)
    sequence.append(7)
    rows: list[RowSampling] = [sequence.row_sampling((9, 7)[:i]) for i in range(3)]
    counts = [dict(zip(r.answer_token_ids.tolist(), r.answer_counts.tolist(), strict=True)) for r in rows]  # type: ignore[union-attr]
    assert counts == [{7: 1}, {7: 1, 9: 1}, {7: 2, 9: 1}]
    sequence.append(9)
    assert sequence.row_sampling().key == rows[1].key != rows[0].key


def test_stop_token_inside_a_true_guess_ends_the_answer() -> None:
    prompt = prompt_of(20)
    answer = expected_answer(prompt, 60)
    stop = next(token for i, token in enumerate(answer) if i > 12 and token not in answer[:i])
    served = Drafted(Oracle())
    sequence = Sequence(
        Request("r", tuple(prompt), SamplingParams(temperature=0, max_tokens=60), frozenset({stop})), CONTEXT
    )
    served.scheduler.add(sequence)
    served.run()
    assert sequence.token_ids[20:].tolist() == answer[: answer.index(stop) + 1]


def test_constraint_holds_behind_every_guess() -> None:
    """Rows of free choice, of two tokens, and forced ones: guesses in between change nothing."""
    rows = [
        *[Row(tuple(range(96)))] * 12,
        Row((5,)),
        Row((6,)),
        *[Row((3, 4))] * 9,
        *[Row(tuple(range(50)))] * 9,
        Row((STOP,)),
    ]

    async def answer(guesses: list[int] | None) -> tuple[list[int], int]:
        engine = make_engine(MaskedRunner())
        scheduler = engine._worker._scheduler
        prompt = prompt_of(30)
        if guesses is None:
            scheduler._drafter = None
        else:
            scheduler._drafter = _Fixed(guesses, len(prompt))
        request = Request(
            "r", tuple(prompt), SamplingParams(temperature=0, max_tokens=60), constraint=Pattern(*rows)
        )
        events = await collect(engine, request)
        await engine.close()
        check_empty(engine)
        steps = engine.statistics.num_steps
        return [token.token_id for event in events for token in event.tokens], steps

    plain, steps = asyncio.run(answer(None))
    assert len(plain) == len(rows)
    guessed, fewer = asyncio.run(answer(plain))
    assert guessed == plain and fewer < steps
    illegal, _ = asyncio.run(answer([96 if i % 3 == 1 else t for i, t in enumerate(plain)]))
    assert illegal == plain


@dataclass
class _Fixed:
    answer: list[int]
    num_prompt: int

    def propose(self, token_ids: npt.NDArray[np.int32], max_tokens: int) -> npt.NDArray[np.int32]:
        return np.array(self.answer[len(token_ids) - self.num_prompt :][:max_tokens], np.int32)


def test_engine_counts_its_guesses_and_off_makes_none() -> None:
    # The fake model never repeats itself; what it reads is made to look as if it would.
    prompt = prompt_of(24) * 2

    async def run(speculation: str) -> tuple[list[int], int]:
        runner = FakeRunner()
        engine = make_engine(runner, speculation=speculation)
        request = Request("r", tuple(prompt), SamplingParams(temperature=0, max_tokens=30))
        events = await collect(engine, request)
        await engine.close()
        return [t.token_id for e in events for t in e.tokens], engine.statistics.num_draft_tokens

    assert asyncio.run(run("off")) == (expected_answer(prompt, 30), 0)
    assert asyncio.run(run("ngram"))[0] == expected_answer(prompt, 30)


def test_unknown_speculation_is_named() -> None:
    with pytest.raises(ConfigError, match="speculation is 'eagle'; expected 'ngram' or 'off'"):
        EngineConfig(speculation="eagle")  # type: ignore[arg-type]
