"""Prompts that go on, part or end within a block that is cached: its first positions are used again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from harmonium.config import KvCache
from harmonium.engine import LocalEngine, TokenEvent
from harmonium.engine.create import create_engine
from harmonium.testing import make_tiny_checkpoint
from tests.engine.serving import answer, check_empty, collect, greedy, make_engine, prompt_of
from tests.engine.test_adapters import SIZES, prompt, settings

LENGTHS = (2, 31, 32, 33, 64, 75, 150)


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token.token_id for event in events for token in event.tokens]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_repeated_prompt_computes_one_token_once_its_last_block_is_whole(length: int) -> None:
    async def run() -> None:
        engine = make_engine()
        tokens = prompt_of(length)
        first = await collect(engine, greedy(tokens, 40))
        again = await collect(engine, greedy(tokens, 40))
        assert first[0].num_cached_tokens == 0
        assert again[0].num_cached_tokens == length - 1
        assert tokens_of(again) == tokens_of(first)
        await engine.close()
        check_empty(engine)

    asyncio.run(run())


@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
def test_native_answers_are_those_of_an_engine_that_computes_all(tmp_path: Path, kv_cache: KvCache) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "tiny", seed=5, **SIZES)
    start = prompt(200, 1)
    prompts = [start[:150], start[:150], (*start[:75], *prompt(30, 2)), (*start[:9], *prompt(60, 3)), start]

    async def answers(is_cached: bool) -> tuple[list[list[int]], int]:
        config = settings(kv_cache=kv_cache, prefix_cache=is_cached)
        engine: LocalEngine = await asyncio.to_thread(create_engine, checkpoint, config)
        listed = [await answer(engine, greedy(tokens, 40)) for tokens in prompts]
        await engine.close()
        return listed, engine.statistics.num_cached_tokens

    alone, _ = asyncio.run(answers(False))
    cached, num_cached = asyncio.run(answers(True))
    # An int8 cache rounds, and a token alone is not computed quite as one among others: close rows part.
    num_compared = 40 if kv_cache == "bf16" else 8
    assert [tokens[:num_compared] for tokens in cached] == [tokens[:num_compared] for tokens in alone]
    assert num_cached == 149 + 75 + 9 + 150  # the last prompt parts where the first one's answer began
