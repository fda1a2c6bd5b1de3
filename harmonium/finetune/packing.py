"""Samples -> the batches of each step. Needs no PyTorch.

Stateless: a step's batches follow from the seed and the step's number, so a run goes on from that
number alone.

Samples lie one after the other without padding (the model keeps them apart by `starts`), so a batch is only a
choice of samples. Samples of an epoch are shuffled, then filled into batches a window at a time, the longest
first, and the batches are shuffled again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harmonium.errors import ConfigError
from harmonium.finetune.data import Sample

WINDOW = 256
"""Samples that compete for the places in a few batches: more pack tighter, fewer mix better."""

SampleSource = Callable[[int], Sequence[Sample]]
"""The samples of a step, by its number from 0: the same for the same number, if a run is to be repeatable."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Samples in T rows. start_S: the row where each begins. The loss is on R rows: row_R predicts target_R,
    which counts weight_R (float32). Integers are int64.
    """

    token_id_T: npt.NDArray[np.int64]
    start_S: tuple[int, ...]
    row_R: npt.NDArray[np.int64]
    target_R: npt.NDArray[np.int64]
    weight_R: npt.NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.token_id_T)

    @property
    def weight(self) -> float:
        """What the batch counts in the mean loss of a step."""
        return float(self.weight_R.sum(dtype=np.float64))


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """The samples in their order. At least one, none of them empty."""
    lengths = [len(sample.token_id_T) for sample in samples]
    start_S = np.cumsum([0, *lengths[:-1]])
    token_id_T = np.concatenate([sample.token_id_T for sample in samples]).astype(np.int64)
    weight_T = np.concatenate([sample.weight_T for sample in samples]).astype(np.float32)
    weight_T[start_S] = 0  # nothing comes before a sample's first token
    (place_R,) = np.nonzero(weight_T)
    return PackedBatch(
        token_id_T, tuple(map(int, start_S)), place_R - 1, token_id_T[place_R], weight_T[place_R]
    )


class EpochBatches:
    """Every sample once an epoch. batch_tokens: most rows of a batch; accumulate: batches of a step.

    An epoch's last step may have fewer. Raises ConfigError when a sample is longer than batch_tokens.
    """

    def __init__(
        self, samples: Sequence[Sample], batch_tokens: int, accumulate: int, epochs: int, seed: int
    ) -> None:
        longest = max(len(sample.token_id_T) for sample in samples)
        if longest > batch_tokens:
            raise ConfigError(f"batch_tokens is {batch_tokens:,}; a sample has {longest:,} tokens")
        self._samples, self._batch_tokens, self._accumulate, self._seed = (
            samples,
            batch_tokens,
            accumulate,
            seed,
        )
        self._cached: tuple[int, list[list[int]]] = (-1, [])
        self._first_steps = [0]
        for epoch in range(epochs):
            steps = -(-len(self._epoch(epoch)) // accumulate)
            self._first_steps.append(self._first_steps[-1] + steps)
        self.num_steps = self._first_steps[-1]

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        return int(np.searchsorted(self._first_steps, step, side="right")) - 1

    def ends_epoch(self, step: int) -> bool:
        """Whether the step is its epoch's last."""
        return step + 1 in self._first_steps

    def batches(self, step: int, rank: int = 0, world: int = 1) -> list[PackedBatch]:
        """The batches of a step from 0 to num_steps - 1: those that process `rank` of `world` computes."""
        return [pack([self._samples[index] for index in batch]) for batch in self._chosen(step)[rank::world]]

    def _chosen(self, step: int) -> list[list[int]]:
        epoch = self.epoch_of(step)
        first = (step - self._first_steps[epoch]) * self._accumulate
        return self._epoch(epoch)[first : first + self._accumulate]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self._cached[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._cached = epoch, self._fill(generator)
        return self._cached[1]

    def _fill(self, generator: np.random.Generator) -> list[list[int]]:
        order = [int(index) for index in generator.permutation(len(self._samples))]
        batches: list[list[int]] = []
        for start in range(0, len(order), WINDOW):
            lengths = {index: len(self._samples[index].token_id_T) for index in order[start : start + WINDOW]}
            batches += fill(lengths, self._batch_tokens)
        return [batches[int(index)] for index in generator.permutation(len(batches))]


class DrawnBatches:
    """Fresh samples for each step, from a function: a generator of tasks, a curriculum."""

    def __init__(self, source: SampleSource, batch_tokens: int, num_steps: int) -> None:
        self._source, self._batch_tokens, self.num_steps = source, batch_tokens, num_steps

    def epoch_of(self, step: int) -> int:
        """Always 0."""
        return 0

    def ends_epoch(self, step: int) -> bool:
        """Whether the step is the last of all."""
        return step + 1 == self.num_steps

    def batches(self, step: int, rank: int = 0, world: int = 1) -> list[PackedBatch]:
        """The step's samples, in as few batches as they fit in: those of process `rank` of `world`."""
        return packed_batches(self._source(step), self._batch_tokens)[rank::world]


def packed_batches(samples: Sequence[Sample], batch_tokens: int) -> list[PackedBatch]:
    """All samples in batches, the same ones every time. Raises ConfigError for one that is too long."""
    lengths = {index: len(sample.token_id_T) for index, sample in enumerate(samples)}
    longest = max(lengths.values(), default=0)
    if longest > batch_tokens:
        raise ConfigError(f"batch_tokens is {batch_tokens:,}; a sample has {longest:,} tokens")
    return [pack([samples[index] for index in batch]) for batch in fill(lengths, batch_tokens)]


def fill(lengths: dict[int, int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of at most batch_tokens: the longest first, each where it fits most tightly."""
    batches: list[tuple[int, list[int]]] = []
    for index, length in sorted(lengths.items(), key=lambda item: -item[1]):
        fits = [place for place, (room, _) in enumerate(batches) if room >= length]
        if fits:
            place = min(fits, key=lambda each: batches[each][0])
            room, batch = batches[place]
            batches[place] = (room - length, [*batch, index])
        else:
            batches.append((batch_tokens - length, [index]))
    return [batch for _, batch in batches]


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): lines are drawn by the seed, and a line's samples stay together.

    Raises ConfigError when one of the two would be empty.
    """
    lines = sorted({sample.line for sample in samples})
    count = max(1, round(share * len(lines)))
    if count >= len(lines):
        raise ConfigError(
            f"validation is {share} of {len(lines)} lines with a loss; nothing is left to train on"
        )
    generator = np.random.Generator(np.random.PCG64([seed, 1 << 32]))
    held = {lines[int(index)] for index in generator.permutation(len(lines))[:count]}
    return (
        [sample for sample in samples if sample.line not in held],
        [sample for sample in samples if sample.line in held],
    )
