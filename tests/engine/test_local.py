from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harmonium.engine import LocalEngine, Request, Token
from harmonium.engine.sequence import draw_key
from harmonium.errors import ConfigError, EngineClosed, PromptTooLong, RequestError
from harmonium.model.batch import Batch, RowSampling, SamplingParams, StepResult
from tests.engine.fake_runner import FakeRunner, expected_answer, fake_config, last_hidden
from tests.engine.serving import (
    answer,
    check_empty,
    collect,
    greedy,
    make_engine,
    prompt_of,
    serve,
)

LENGTHS = (1, 7, 31, 32, 33, 64, 129, 300)


def test_answer_follows_the_whole_history() -> None:
    for length in LENGTHS:
        prompt = prompt_of(length)
        assert serve(make_engine(), [greedy(prompt, 70)]) == [expected_answer(prompt, 70)]


def test_batched_equals_alone() -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    runner = FakeRunner()
    answers = serve(make_engine(runner), [greedy(prompt, 40) for prompt in prompts])
    assert answers == [expected_answer(prompt, 40) for prompt in prompts]
    assert max(len(batch.context_length_S) for batch in runner.batches) == len(prompts)


@pytest.mark.parametrize("max_batch_tokens", [8, 31, 32, 33, 100])
def test_chunked_equals_whole(max_batch_tokens: int) -> None:
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    engine = make_engine(max_batch_tokens=max_batch_tokens)
    answers = serve(engine, [greedy(prompt, 5) for prompt in prompts])
    assert answers == [expected_answer(prompt, 5) for prompt in prompts]


@pytest.mark.parametrize("window", [1, 2, 8, 32, 33, 128])
def test_every_window_gives_its_own_answer(window: int) -> None:
    prompt = prompt_of(150)
    engine = make_engine(FakeRunner(window), max_batch_tokens=48)
    assert serve(engine, [greedy(prompt, 80)]) == [expected_answer(prompt, 80, window)]


def test_decode_gets_a_token_of_every_step_while_a_long_prompt_is_prefilled() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, max_batch_tokens=16)

    async def run() -> None:
        async with aclosing(engine.generate(greedy(prompt_of(4), None))) as first:
            await anext(first)
            before = len(runner.batches)
            late = asyncio.create_task(answer(engine, greedy(prompt_of(320, 1), 1)))
            await late
        mixed = [b for b in runner.batches[before:] if len(b.context_length_S) == 2]
        assert len(mixed) >= 320 // 15
        assert all(b.query_start_S1[1] == 1 and len(b.logit_row_R) >= 1 for b in mixed)
        # The prompt takes all that the decode leaves.
        assert all(b.query_start_S1[2] == 16 for b in mixed[:-1])
        await engine.close()

    asyncio.run(run())


def test_preempted_sequence_resumes_with_same_tokens() -> None:
    prompts = [prompt_of(60, seed) for seed in range(4)]
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=200)

    def sampling(tokens: list[int]) -> RowSampling:
        return RowSampling(params, draw_key(7, len(tokens)))

    for prefix_cache in (False, True):
        engine = make_engine(context_length=512, num_full_blocks=16, prefix_cache=prefix_cache)
        answers = serve(engine, [Request("r", tuple(prompt), params) for prompt in prompts])
        assert engine.statistics.num_preemptions > 0
        assert answers == [expected_answer(prompt, 200, sampling=sampling) for prompt in prompts]


def test_window_blocks_run_out_and_answers_stay_the_same() -> None:
    prompts = [prompt_of(100, seed) for seed in range(5)]
    engine = make_engine(num_window_blocks=4)
    answers = serve(engine, [greedy(prompt, 60) for prompt in prompts])
    assert answers == [expected_answer(prompt, 60) for prompt in prompts]


def test_window_blocks_in_use_stay_bounded() -> None:
    window = 40
    used: list[int] = []
    runner = FakeRunner(
        window, before_step=lambda batch: used.append(int((batch.window_block_SB >= 0).sum()))
    )
    serve(make_engine(runner, max_batch_tokens=64), [greedy(prompt_of(500), 400)])
    assert max(used) <= (window + 64) // 32 + 2
    # In decode: what a query sees, a block more where it begins inside one.
    assert max(used[-390:]) <= (window - 1) // 32 + 2


def test_prefix_is_reused_with_the_same_answer_and_counted() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    shared = prompt_of(200)

    async def run() -> None:
        first = await collect(engine, greedy([*shared, 1, 2, 3], 20))
        assert first[-1].num_cached_tokens == 0
        computed = sum(len(batch.token_id_T) for batch in runner.batches)
        request = greedy([*shared, 4, 5], 20)
        second = await collect(engine, request)
        assert second[0].num_cached_tokens == second[-1].num_cached_tokens == 192
        assert [t.token_id for e in second for t in e.tokens] == expected_answer(request.token_ids, 20)
        assert sum(len(b.token_id_T) for b in runner.batches) - computed == 202 - 192 + 19
        await engine.close()

    asyncio.run(run())
    assert engine.statistics.num_prefix_hits == 1
    assert engine.statistics.num_cached_tokens == 192


def test_last_prompt_token_is_always_computed() -> None:
    engine = make_engine()

    async def run() -> None:
        for _ in range(2):
            events = await collect(engine, greedy(prompt_of(64), 3))
        assert events[-1].num_cached_tokens == 63
        await engine.close()

    asyncio.run(run())


def test_prefix_cache_off_reuses_nothing() -> None:
    engine = make_engine(prefix_cache=False)

    async def run() -> None:
        for _ in range(2):
            events = await collect(engine, greedy(prompt_of(100), 3))
        assert events[-1].num_cached_tokens == 0
        await engine.close()

    asyncio.run(run())
    assert engine.statistics.full_blocks_cached == engine.statistics.window_blocks_cached == 0


def test_different_salts_share_nothing() -> None:
    engine = make_engine()

    async def run() -> None:
        await collect(engine, greedy(prompt_of(100), 3, cache_salt="a"))
        events = await collect(engine, greedy(prompt_of(100), 3, cache_salt="b"))
        assert events[-1].num_cached_tokens == 0
        events = await collect(engine, greedy(prompt_of(100), 3, cache_salt="a"))
        assert events[-1].num_cached_tokens == 96
        await engine.close()

    asyncio.run(run())


def test_chat_whose_reasoning_is_dropped_resumes_near_the_first_difference() -> None:
    """Each turn's prompt is the last one plus the answer without its long reasoning."""
    window = 128
    engine = make_engine(
        FakeRunner(window),
        context_length=4096,
        num_full_blocks=160,
        num_window_blocks=24,
        max_batch_tokens=256,
    )

    async def run() -> None:
        prompt, shared = prompt_of(2000), 0
        for turn in range(3):
            events = await collect(engine, greedy(prompt, 300))
            tokens = [t.token_id for e in events for t in e.tokens]
            assert tokens == expected_answer(prompt, 300, window)
            if turn:
                assert events[-1].num_cached_tokens >= shared - 32
            shared = len(prompt)
            prompt = [*prompt, *tokens[-50:], *prompt_of(40, turn)]
        await engine.close()

    asyncio.run(run())


def test_long_chat_stays_resumable_while_others_are_served() -> None:
    """The same at its size, with the pools that a 20b model's memory plan gives for 16 sequences."""
    engine = make_engine(
        FakeRunner(128),
        context_length=24576,
        num_full_blocks=2 * 768,
        num_window_blocks=226,
        max_sequences=16,
    )

    async def run() -> None:
        prompt, parts_at = prompt_of(20_000), 0
        for turn in range(3):
            events = await collect(engine, greedy(prompt, 200))
            assert events[-1].num_cached_tokens >= parts_at - 32
            tokens = [t.token_id for e in events for t in e.tokens]
            # A tool's answer follows at once, and the reasoning before it is kept.
            kept = [*prompt, *tokens, *prompt_of(50, turn)]
            events = await collect(engine, greedy(kept, 5))
            assert events[-1].num_cached_tokens >= len(prompt) + len(tokens) - 33
            parts_at = len(prompt)
            prompt = [*prompt, *tokens[-80:], *prompt_of(60, turn + 5)]
            await asyncio.gather(
                *(collect(engine, greedy(prompt_of(1500, 10 * turn + i), 20)) for i in range(6))
            )
        await engine.close()

    asyncio.run(run())


def test_two_prompts_that_part_make_the_third_resume_where_they_did() -> None:
    """A shared system prompt whose window blocks are gone is kept resumable once it was seen to be shared."""
    engine = make_engine(
        FakeRunner(64), context_length=2048, num_full_blocks=200, num_window_blocks=14, max_batch_tokens=64
    )

    async def run() -> list[int]:
        cached = []
        for seed in range(3):
            events = await collect(engine, greedy(prompt_of(640) + prompt_of(500, seed + 1), 5))
            cached.append(events[-1].num_cached_tokens)
        await engine.close()
        return cached

    assert asyncio.run(run()) == [0, 0, 640]


def test_stop_token_ends_the_answer_and_is_its_last_token() -> None:
    prompt = prompt_of(20)
    expected = expected_answer(prompt, 50)
    stop = expected[5]
    end = expected.index(stop) + 1

    async def run(request: Request) -> tuple[list[int], str | None]:
        engine = make_engine()
        events = await collect(engine, request)
        await engine.close()
        return [t.token_id for e in events for t in e.tokens], events[-1].finish_reason

    assert asyncio.run(run(greedy(prompt, 50, stop_token_ids=frozenset({stop})))) == (expected[:end], "stop")
    params = SamplingParams(temperature=0, max_tokens=50, ignore_stop=True)
    request = Request("r", tuple(prompt), params, stop_token_ids=frozenset({stop}))
    assert asyncio.run(run(request)) == (expected, "length")


def test_answer_without_limit_fills_the_context() -> None:
    engine = make_engine(context_length=100, num_full_blocks=4)
    assert serve(engine, [greedy(prompt_of(60), None)]) == [expected_answer(prompt_of(60), 40)]


def test_penalties_see_prompt_and_answer_counts() -> None:
    params = SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.5, frequency_penalty=0.5)
    prompt = prompt_of(30)

    def sampling(tokens: list[int]) -> RowSampling:
        unique, counts = np.unique(np.array(tokens[30:], np.int32), return_counts=True)
        return RowSampling(params, 0, np.unique(np.array(prompt, np.int32)), unique, counts.astype(np.int32))

    answers = serve(make_engine(), [Request("r", tuple(prompt), params)])
    assert answers == [expected_answer(prompt, 40, sampling=sampling)]


def test_logprobs_come_only_when_asked_for() -> None:
    async def run(params: SamplingParams) -> list[object]:
        engine = make_engine()
        events = await collect(engine, Request("r", (1, 2), params))
        await engine.close()
        return [(t.logprob, len(t.top_logprobs)) for e in events for t in e.tokens]

    assert asyncio.run(run(SamplingParams(max_tokens=2, logprobs=3))) == [(-0.5, 3)] * 2
    assert asyncio.run(run(SamplingParams(max_tokens=2))) == [(None, 0)] * 2


def test_request_without_seed_draws_another_one_each_time() -> None:
    request = Request("r", tuple(prompt_of(10)), SamplingParams(max_tokens=30))
    answers = serve(make_engine(), [request] * 3)
    assert answers[0] != answers[1] != answers[2]


def test_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    engine = make_engine()
    with pytest.raises(PromptTooLong, match=r"prompt has 1,024 tokens; the context is 1,024"):
        engine.admit(greedy([1] * 1024))
    engine.admit(greedy([1] * 1023))
    for prompt, message in (
        ([], "empty"),
        ([1, 97], "prompt token 1 is 97; expected 0 to 96"),
        ([-1], "is -1"),
    ):
        with pytest.raises(RequestError, match=message):
            asyncio.run(collect(engine, greedy(prompt)))
    with pytest.raises(RequestError, match="logit_bias names token 97"):
        engine.admit(Request("r", (1,), SamplingParams(logit_bias={97: 1.0})))
    asyncio.run(engine.close())


def test_cache_that_cannot_hold_one_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_full_blocks is 31; one sequence of 1,024 tokens needs 32"):
        make_engine(num_full_blocks=31)
    with pytest.raises(ConfigError, match=r"num_window_blocks is 2; .* needs 3"):
        make_engine(num_window_blocks=2)


def test_smallest_cache_serves_a_sequence_of_the_whole_context() -> None:
    engine = make_engine(context_length=1000, num_full_blocks=32, num_window_blocks=3)
    assert serve(engine, [greedy(prompt_of(700), 300)] * 2) == [expected_answer(prompt_of(700), 300)] * 2


def test_model_without_window_layers_needs_no_window_blocks() -> None:
    class FullRunner(FakeRunner):
        """Its window layers read blocks that only it knows of, as many as the full pool has."""

        def __init__(self) -> None:
            super().__init__(window=1)
            self.config = fake_config(4096, ("full",))

        def allocate_cache(self, num_full_blocks: int, num_window_blocks: int) -> None:
            assert num_window_blocks == 0
            super().allocate_cache(num_full_blocks, num_full_blocks)

        def _step(self, batch: Batch) -> StepResult:
            return super()._step(replace(batch, window_block_SB=batch.full_block_SB))

    runner = FullRunner()
    engine = make_engine(runner, num_window_blocks=0)
    prompt = prompt_of(200)
    assert serve(engine, [greedy(prompt, 20)] * 2) == [expected_answer(prompt, 20, window=4096)] * 2


def test_logits_of_every_position_come_back_while_others_are_served() -> None:
    engine = make_engine()
    prompt = prompt_of(200)

    async def run() -> np.ndarray:
        logits, *_ = await asyncio.gather(engine.logits(tuple(prompt)), answer(engine, greedy(prompt, 50)))
        assert (await engine.logits(tuple(prompt)) == logits).all()  # though its prefix is cached by now
        for bad, error in (((), RequestError), ((97,), RequestError), ((1,) * 1025, PromptTooLong)):
            with pytest.raises(error):
                await engine.logits(bad)
        await engine.close()
        with pytest.raises(EngineClosed):
            await engine.logits((1,))
        return logits

    logits = asyncio.run(run())
    assert logits.shape == (200, 97) and logits.dtype == np.float32
    runner = FakeRunner()
    alone = make_engine(runner, max_batch_tokens=8)
    assert (asyncio.run(alone.logits(tuple(prompt))) == logits).all()
    asyncio.run(alone.close())
    assert len(np.unique(logits, axis=0)) == len(np.unique(last_hidden(prompt)))
    check_empty(engine)


def test_engines_need_no_native_kernels() -> None:
    program = "import sys, harmonium.engine; print('harmonium._native' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_info_says_what_is_served() -> None:
    engine = make_engine()
    assert isinstance(engine, LocalEngine)
    assert (engine.info.model_name, engine.info.context_length, engine.info.vocabulary_size) == (
        "fake",
        1024,
        97,
    )
    asyncio.run(engine.close())


def test_score_is_the_log_softmax_of_the_logits_before_each_token() -> None:
    prompt = tuple(prompt_of(37))

    async def run() -> tuple[tuple[Token, ...], np.ndarray]:
        engine = make_engine()
        try:
            return await engine.score(prompt, 3), await engine.logits(prompt)
        finally:
            await engine.close()
            check_empty(engine)

    tokens, logits = asyncio.run(run())
    exact = logits.astype(np.float64)
    logprobs = exact - np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True))
    logprobs -= exact.max(1, keepdims=True)
    assert [token.token_id for token in tokens] == list(prompt)
    assert (tokens[0].logprob, tokens[0].top_logprobs) == (None, ())
    for row, token in zip(logprobs, tokens[1:], strict=False):
        assert token.logprob == pytest.approx(row[token.token_id], abs=1e-4)
        best = sorted(range(len(row)), key=lambda place: (-row[place], place))[:3]
        assert [token_id for token_id, _ in token.top_logprobs] == best
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(row[best], abs=1e-4)
