"""What a seed draws: the same tokens whatever is computed beside them, on a model with real logits."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.config import EngineConfig
from harmonium.engine import LocalEngine, Request
from harmonium.engine.create import create_engine
from harmonium.model import unembedding
from harmonium.model.batch import SamplingParams
from harmonium.testing import make_tiny_checkpoint
from tests.engine.serving import answer

VOCABULARY_SIZE = 499


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    return make_tiny_checkpoint(folder, seed=5, vocabulary_size=VOCABULARY_SIZE)


def request(seed: int, **settings: Any) -> Request:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, 20).tolist()
    return Request(f"r{seed}", tuple(ids), SamplingParams(seed=seed, max_tokens=15, **settings))


def answers(checkpoint: Path, requests: list[Request], together: bool, **config: Any) -> list[list[int]]:
    engine = create_engine(
        checkpoint, EngineConfig(context_length=256, threads=1, experts="mapped", **config)
    )
    assert isinstance(engine, LocalEngine)

    async def run() -> list[list[int]]:
        try:
            if together:
                return list(await asyncio.gather(*(answer(engine, item) for item in requests)))
            return [await answer(engine, item) for item in requests]
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 20}])
def test_asking_for_log_probabilities_changes_no_token(
    checkpoint: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them rows of logits are whole, without them they are screened."""
    screened, shares = unembedding.screened_logits, []

    def count(*args: Any) -> float:
        shares.append(screened(*args))
        return shares[-1]

    monkeypatch.setattr(unembedding, "screened_logits", count)
    requests = [request(seed, **settings) for seed in range(4)]
    plain = answers(checkpoint, requests, False, weights="int8")
    assert shares
    shares.clear()
    asked = [replace(item, sampling=replace(item.sampling, logprobs=2)) for item in requests]
    assert answers(checkpoint, asked, False, weights="int8") == plain
    assert not shares


def test_seeded_answers_are_those_of_requests_alone_and_of_another_start(checkpoint: Path) -> None:
    """bf16: a row's arithmetic is the same whatever is computed with it."""
    requests = [request(seed, temperature=0.8) for seed in range(7)]
    alone = answers(checkpoint, requests, False, weights="bf16")
    assert len({tuple(found) for found in alone}) == 7
    assert answers(checkpoint, requests, True, weights="bf16") == alone
    assert answers(checkpoint, requests, True, weights="bf16", speculation="off") == alone
