from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonium.engine import Request
from harmonium.engine.blocks import PagedCache
from harmonium.engine.scheduler import Scheduler, build_batch
from harmonium.engine.sequence import Sequence
from harmonium.model.batch import SamplingParams
from tests.engine.fake_runner import FakeRunner, expected_answer
from tests.engine.serving import prompt_of

CONTEXT = 320


@dataclass
class Served:
    """A scheduler and a fake runner, stepped by hand."""

    num_full: int = 32
    num_window: int = 32
    window: int = 40
    max_sequences: int = 4
    max_batch_tokens: int = 64
    prefix_cache: bool = True
    finished: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = PagedCache(
            self.num_full,
            self.num_window,
            block_tokens=32,
            window=self.window,
            max_sequences=self.max_sequences,
            max_tokens=CONTEXT,
            prefix_cache=self.prefix_cache,
        )
        self.runner = FakeRunner(self.window, self.max_batch_tokens)
        self.runner.allocate_cache(self.num_full, self.num_window)
        self.scheduler = Scheduler(self.cache, self.max_sequences, self.max_batch_tokens)

    def add(self, prompt: list[int], max_tokens: int = 5) -> Sequence:
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        sequence = Sequence(Request("r", tuple(prompt), params), CONTEXT)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        """One step, with the books checked around it."""
        chunks = self.scheduler.schedule()
        self.cache.check()
        if not chunks:
            return
        assert sum(chunk.num_tokens for chunk in chunks) <= self.max_batch_tokens
        decoding = [s for s in self.scheduler.running if s.num_pending == 1]
        progress = self.scheduler.commit(chunks, self.runner.step(build_batch(chunks, self.cache)))
        assert {s for s in decoding if s.lease is None} <= {item.sequence for item in progress}
        self.finished += [item.sequence for item in progress if item.finish_reason is not None]
        self.cache.check()

    def run(self, max_steps: int = 3000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "sequences starve"
        assert self.cache.full.num_used == self.cache.windowed.num_used == 0
        for sequence in self.finished:
            check_answer(sequence, self.window)


def check_answer(sequence: Sequence, window: int) -> None:
    """The tokens so far are what the fake model says without a cache."""
    prompt = list(sequence.request.token_ids)
    tokens = sequence.token_ids.tolist()
    assert tokens == prompt + expected_answer(prompt, len(tokens) - len(prompt), window)


def test_decodes_come_before_prefill_and_prefill_takes_the_rest() -> None:
    served = Served(max_batch_tokens=16)
    decoding = [served.add(prompt_of(3, seed), 20) for seed in range(2)]
    served.step()
    served.add(prompt_of(100))
    chunks = served.scheduler.schedule()
    assert [chunk.sequence for chunk in chunks[:2]] == decoding
    assert [chunk.num_tokens for chunk in chunks] == [1, 1, 14]


def test_sequences_start_in_order_of_arrival() -> None:
    served = Served(max_sequences=2)
    sequences = [served.add(prompt_of(10 + seed, seed), 3) for seed in range(6)]
    served.run()
    assert served.finished == sequences


def test_latest_arrival_is_preempted_and_comes_first_again() -> None:
    served = Served(num_full=10, max_batch_tokens=300, prefix_cache=False)
    first, second, third = (served.add(prompt_of(62, seed), 200) for seed in range(3))
    while not served.scheduler.num_preemptions:
        served.step()
    last = served.scheduler.waiting[0]
    assert last is third and last.lease is None and last.num_tokens > 62
    assert served.scheduler.running[0] is first
    served.run()
    assert served.finished == [first, second, third]


def test_newcomer_waits_until_it_fits_beside_those_that_run() -> None:
    served = Served(num_full=10, max_batch_tokens=300)
    served.add(prompt_of(200), 100)
    late = served.add(prompt_of(90, 1), 100)
    opened = []
    real_open = served.cache.open
    served.cache.open = lambda *a, **k: opened.append(a) or real_open(*a, **k)  # type: ignore[method-assign,func-returns-value]
    for _ in range(60):
        served.step()
    assert late.lease is None and served.scheduler.num_preemptions == 0
    # The one that runs, the one that waits: which is not looked at again while nothing is given back.
    assert len(opened) == 2
    served.run()


def test_oldest_gets_on_though_later_ones_hold_the_blocks() -> None:
    served = Served(num_full=10, num_window=3, max_sequences=3, max_batch_tokens=300)
    for seed in range(3):
        served.add(prompt_of(100, seed), 200)
    served.run()
    assert len(served.finished) == 3


def test_sequence_that_was_scheduled_is_not_preempted_in_the_same_step() -> None:
    """An old sequence in prefill (here: returning logits, 16 tokens a step) waits for a later decode."""
    served = Served(num_full=10, max_batch_tokens=300, prefix_cache=False)
    pieces: list[npt.NDArray[np.float32]] = []
    old = Sequence(Request("r", tuple(prompt_of(170))), CONTEXT, logits_chunk=16, logits_sink=pieces)
    served.scheduler.add(old)
    late = [served.add(prompt_of(150), 100)]
    while served.scheduler.has_work:
        served.step()
    assert set(served.finished) == {old, *late}
    assert sum(map(len, pieces)) == 170
    for sequence in late:
        check_answer(sequence, served.window)


def test_no_more_sequences_run_than_a_step_has_tokens() -> None:
    served = Served(max_batch_tokens=2)
    for seed in range(4):
        served.add(prompt_of(5, seed), 5)
    served.run()


def test_removed_sequence_gives_its_blocks_back() -> None:
    served = Served(prefix_cache=False)
    running, waiting = served.add(prompt_of(100)), served.add(prompt_of(100, 1))
    served.step()
    for sequence in (running, waiting):
        served.scheduler.remove(sequence)
        served.cache.check()
    assert not served.scheduler.has_work and served.cache.full.num_free == 32


def test_cost_of_a_step_does_not_grow_with_the_context() -> None:
    """A sequence that decodes touches only its last block: the index is asked once a block."""
    served = Served()
    sequence = served.add(prompt_of(260), 40)
    for _ in range(6):
        served.step()
    calls = []
    find = served.cache.index.find
    served.cache.index.find = lambda *a: calls.append(a) or find(*a)  # type: ignore[method-assign,func-returns-value]
    before = sequence.num_computed
    while sequence.lease is not None:
        served.step()
    assert len(calls) == sequence.num_tokens // 32 - before // 32


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, CONTEXT - 1), st.integers(1, 120)),
        st.tuples(st.just("remove"), st.integers(0, 10), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 12), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(
    actions=ACTIONS,
    window=st.sampled_from([1, 8, 40, 65]),
    num_full=st.integers(10, 20),
    num_window=st.integers(3, 14),
    max_batch_tokens=st.sampled_from([3, 20, 64, 400]),
    prefix_cache=st.booleans(),
)
def test_any_arrivals_and_cancels_leave_right_answers_and_no_block(
    actions: list[tuple[str, int, int]],
    window: int,
    num_full: int,
    num_window: int,
    max_batch_tokens: int,
    prefix_cache: bool,
) -> None:
    served = Served(num_full, num_window, window, 4, max_batch_tokens, prefix_cache)
    live: list[Sequence] = []
    for what, amount, max_tokens in actions:
        if what == "add":
            shared = prompt_of(amount // 2)
            live.append(served.add(shared + prompt_of(amount - len(shared), amount % 4), max_tokens))
        elif what == "remove":
            live = [s for s in live if s not in served.finished]
            if live:
                leaver = live.pop(amount % len(live))
                served.scheduler.remove(leaver)
                check_answer(leaver, window)
                served.cache.check()
        else:
            for _ in range(amount):
                served.step()
    served.run()
    assert set(served.finished) >= set(live)


@pytest.mark.parametrize("num_window", [3, 4])
def test_smallest_window_pool_still_serves_many(num_window: int) -> None:
    served = Served(num_full=40, num_window=num_window)
    for seed in range(4):
        served.add(prompt_of(150, seed), 60)
    served.run()
