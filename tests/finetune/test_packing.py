"""Batches: every sample once an epoch, none longer than asked, the same for the same seed. No PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from harmonium.errors import ConfigError
from harmonium.finetune.data import Sample
from harmonium.finetune.packing import EpochBatches, pack, split


def sample(length: int, line: int, first: int = 0) -> Sample:
    weight_T = np.zeros(length, np.float32)
    weight_T[first:] = 1
    return Sample(np.full(length, line, np.int32), weight_T, line)


SAMPLES = [sample(3 + index * 7 % 20, index + 1) for index in range(40)]


def test_an_epoch_has_every_sample_once() -> None:
    batches = EpochBatches(SAMPLES, batch_tokens=50, accumulate=3, epochs=2, seed=4)
    for epoch in (0, 1):
        steps = [step for step in range(batches.num_steps) if batches.epoch_of(step) == epoch]
        packed = [batch for step in steps for batch in batches.batches(step)]
        assert max(len(batch.token_id_T) for batch in packed) <= 50
        lines = [int(batch.token_id_T[start]) for batch in packed for start in batch.start_S]
        assert sorted(lines) == list(range(1, 41))
        assert batches.ends_epoch(steps[-1])
        total = sum(len(each.token_id_T) for each in SAMPLES)
        assert len(packed) <= 1.15 * total / 50 + 1


def test_a_steps_batches_follow_from_seed_and_number_alone() -> None:
    def tokens(seed: int, step: int, warm: int) -> list[list[int]]:
        batches = EpochBatches(SAMPLES, 50, 2, 3, seed)
        for before in range(warm):
            batches.batches(before)
        return [batch.token_id_T.tolist() for batch in batches.batches(step)]

    last = EpochBatches(SAMPLES, 50, 2, 3, 1).num_steps - 1
    assert tokens(1, last, 0) == tokens(1, last, last)
    assert tokens(1, 0, 0) != tokens(2, 0, 0)


def test_rows_predict_the_token_after_them() -> None:
    batch = pack([sample(4, 7, first=2), sample(3, 9)])
    # The first token of a sample has nothing before it, whatever its weight.
    assert batch.row_R.tolist() == [1, 2, 4, 5]
    assert batch.target_R.tolist() == [7, 7, 9, 9]
    assert batch.start_S == (0, 4)
    assert batch.weight == 4.0


def test_a_sample_that_fits_no_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="batch_tokens is 20; a sample has 22 tokens"):
        EpochBatches(SAMPLES, 20, 1, 1, 0)


def test_validation_takes_whole_lines() -> None:
    doubled = SAMPLES + SAMPLES
    kept, held = split(doubled, 0.25, seed=3)
    assert len(held) == 20
    assert len(kept) == 60
    assert not {each.line for each in kept} & {each.line for each in held}
    assert split(doubled, 0.25, seed=3)[1] == held
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        split(SAMPLES[:1], 0.5, seed=0)
