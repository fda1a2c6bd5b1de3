"""Which experts stay and which go; what is given out is there, whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint.expert_pieces import ExpertPieces, Piece
from harmonium.errors import CheckpointError
from harmonium.model.expert_cache import ExpertCache

NUM_LAYERS, NUM_EXPERTS = 4, 8
PIECE_BYTES = (5000, 300, 2600, 150)
SLOT_BYTES = 9 * 4096
BYTES = np.random.default_rng(1).integers(0, 256, (NUM_LAYERS, NUM_EXPERTS * sum(PIECE_BYTES) + 13), np.uint8)


class Experts:
    """A cache over files of random bytes, and what steps do with it."""

    def __init__(self, folder: Path, num_slots: int) -> None:
        self.layers = []
        for layer in range(NUM_LAYERS):
            file = folder / f"layer-{layer}"
            file.write_bytes(BYTES[layer].tobytes())
            offset, pieces = 13, []
            for column, size in enumerate(PIECE_BYTES):
                pieces.append(Piece(column, file, offset, size))
                offset += NUM_EXPERTS * size
            self.layers.append(ExpertPieces(tuple(pieces), None))
        self.cache = ExpertCache(self.layers, NUM_EXPERTS, num_slots, SLOT_BYTES)

    def use(self, layer: int, *experts: int, counts: list[int] | None = None) -> None:
        """A layer of a step: every expert comes once, and its bytes are the file's."""
        wanted = np.array(experts)
        seen: list[int] = []
        for group in self.cache.use(layer, wanted, np.array(counts or [1] * len(experts))):
            seen += group
            for expert in group:
                for piece, at in zip(
                    self.layers[layer].pieces, self.cache.place_EC[layer][expert], strict=True
                ):
                    start = piece.offset + expert * piece.nbytes
                    expected = BYTES[layer][start : start + piece.nbytes]
                    np.testing.assert_array_equal(self.cache.pool[at : at + piece.nbytes], expected)
        assert sorted(seen) == sorted(experts)

    def misses(self, layer: int, *experts: int) -> int:
        before = self.cache.counts.misses
        self.use(layer, *experts)
        return self.cache.counts.misses - before

    def present(self, layer: int) -> set[int]:
        return {expert for at, expert in self.cache._slot_of if at == layer}


def make(folder: Path, num_slots: int) -> Iterator[Experts]:
    experts = Experts(folder, num_slots)
    yield experts
    experts.cache.close()


@pytest.fixture
def six(tmp_path: Path) -> Iterator[Experts]:
    yield from make(tmp_path, 6)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Experts]:
    yield from make(tmp_path, 1)


def test_experts_that_are_there_are_not_read_again(six: Experts) -> None:
    assert six.misses(0, 1, 2) == 2
    read = six.cache.counts.bytes_read
    assert six.misses(0, 2, 1) == 0
    assert six.cache.counts.hits == 2 and six.cache.counts.bytes_read == read


def test_more_experts_than_slots_come_one_after_the_other_each_read_once(one: Experts) -> None:
    assert one.misses(2, *range(NUM_EXPERTS)) == NUM_EXPERTS
    bytes_read = one.cache.counts.bytes_read
    assert sum(PIECE_BYTES) * NUM_EXPERTS <= bytes_read <= SLOT_BYTES * NUM_EXPERTS


def test_frequent_experts_stay_and_rare_ones_go(six: Experts) -> None:
    for _ in range(3):
        six.use(0, 1, 2)
    for expert in (3, 4, 5, 6, 7):
        six.use(0, expert)
    assert {1, 2} <= six.present(0) and 3 not in six.present(0)


def test_uses_long_ago_weigh_less(six: Experts) -> None:
    for _ in range(3):
        six.use(0, 0)
    for _ in range(200):
        six.use(0, 1)
    six.use(0, 2, 3, 4, 5)
    six.use(0, 6)
    assert 0 not in six.present(0) and 1 in six.present(0)


def test_between_equals_the_layer_that_comes_last_goes_first(six: Experts) -> None:
    """Three layers of three experts in turn, room for six: least recently used would find none."""
    for _ in range(3):
        for layer in range(3):
            six.use(layer, 0, 1, 2)
    misses = sum(six.misses(layer, 0, 1, 2) for _ in range(4) for layer in range(3))
    assert misses <= 4 * (3 * 3 - 6 + 2)


def test_guess_that_comes_true_is_no_miss(six: Experts) -> None:
    six.cache.guess(1, [3, 4], limit=2)
    assert six.misses(1, 3, 4) == 0
    counts = six.cache.counts
    assert (counts.guesses, counts.true_guesses, counts.hits + counts.late_hits) == (2, 2, 2)


def test_guesses_are_kept_for_their_layer_and_let_go_after_it(six: Experts) -> None:
    six.cache.guess(1, [0, 1, 2, 3], limit=4)
    six.use(0, *range(NUM_EXPERTS))
    assert six.present(1) == {0, 1, 2, 3}
    six.use(1, 7)
    six.use(2, *range(NUM_EXPERTS))
    assert six.cache.counts.true_guesses == 0 and not six.cache._guesses


def test_guesses_leave_the_room_that_a_step_needs(six: Experts) -> None:
    six.cache.guess(1, list(range(NUM_EXPERTS)), limit=99)
    six.use(0, *range(NUM_EXPERTS))
    six.use(1, *range(NUM_EXPERTS))


def test_expert_that_cannot_be_read_ends_the_use_and_nothing_else(six: Experts, tmp_path: Path) -> None:
    six.use(0, 0)
    file = tmp_path / "layer-1"
    whole = file.read_bytes()
    with file.open("r+b") as opened:
        opened.truncate(4096)
    with pytest.raises(CheckpointError, match="layer-1: has been shortened"):
        six.use(1, 5, 6, 7)
    six.use(0, 0, 1, 2, 3, 4, 5)
    with file.open("r+b") as opened:
        opened.write(whole)
    six.use(1, 5, 6, 7)


def test_consumer_that_stops_leaves_no_slot_held(six: Experts) -> None:
    for _ in range(5):
        groups = six.cache.use(0, np.arange(6), np.ones(6, np.int64))
        next(groups)
        groups.close()
    six.use(1, *range(6))


def check_books(cache: ExpertCache) -> None:
    """Every slot is free, ending, or one expert's, and nothing else says so."""
    held = list(cache._slot_of.values())
    assert sorted([*held, *cache._free, *cache._ending]) == list(range(len(cache._slots)))
    for (layer, expert), index in cache._slot_of.items():
        assert (cache._slots[index].layer, cache._slots[index].expert) == (layer, expert)
        assert tuple(cache._owner[index]) == (layer, expert)
    assert not cache._may_go[[*cache._free, *cache._ending]].any()
    assert cache._guesses <= set(held)


@pytest.mark.parametrize("num_slots", [1, 2, 5, 11, 31, 40])
def test_storm_of_steps_guesses_failures_and_departures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_slots: int
) -> None:
    rng = np.random.default_rng(num_slots)
    experts = Experts(tmp_path, num_slots)
    cache, real = experts.cache, os.preadv
    fails = np.zeros(1, bool)

    def preadv(*arguments: Any) -> int:
        if fails[0]:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    for turn in range(150):
        layer = turn % NUM_LAYERS
        wanted = rng.choice(NUM_EXPERTS, int(rng.integers(1, NUM_EXPERTS + 1)), replace=False)
        fails[0] = turn % 17 == 5
        if rng.random() < 0.7:
            guessed = rng.permutation(NUM_EXPERTS)[:4].tolist()
            cache.guess((layer + 1) % NUM_LAYERS, guessed, int(rng.integers(1, 5)))
        kind = rng.random()
        try:
            if kind < 0.15:
                groups = cache.use(layer, wanted, np.ones(len(wanted), np.int64))
                next(groups)
                groups.close()
            else:
                experts.use(layer, *wanted.tolist(), counts=rng.integers(1, 99, len(wanted)).tolist())
        except CheckpointError:
            pass  # a read that failed earlier, of a guess, is told when its expert is wanted
        check_books(cache)
    for slot in cache._slots:  # nothing may fail after this
        if slot.ticket is not None:
            cache._reader.wait_any([slot.ticket])
    fails[0] = False
    for layer in range(NUM_LAYERS):
        experts.use(layer, *range(NUM_EXPERTS))
    check_books(cache)
    cache.close()
