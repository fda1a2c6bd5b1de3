"""Rows for training that pay for a shared opening once. Needs no PyTorch.

A row is one opening (system and developer message), then as many conversations as fit behind it. Each goes on
from the opening and sees nothing of its neighbors: its positions continue where the opening ends, and its
tokens attend to the opening (segment 0) and to themselves (their own segment). That is what serving computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from harmonium.finetune.data import Sample

PADDING_SEGMENT = -1

Piece = tuple[Sequence[int], bool]
"""Token ids, and whether the model writes them (so whether they have a loss)."""


@dataclass
class Row:
    """token_ids, positions, segments, is_target: one entry a token. num_samples: conversations in the row;
    the first of them is segment 1.
    """

    token_ids: list[int]
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    is_target: list[bool] = field(default_factory=list)
    num_samples: int = 0


def fill_row(opening_ids: Sequence[int], samples: Iterable[Sequence[Piece]], length: int) -> Row:
    """Take samples until one does not fit, drop that one, and pad to `length` tokens."""
    size = len(opening_ids)
    row = Row(list(opening_ids), list(range(size)), [0] * size, [False] * size)
    for pieces in samples:
        count = sum(len(ids) for ids, _ in pieces)
        if len(row.token_ids) + count > length:
            break
        row.num_samples += 1
        row.positions += range(size, size + count)
        row.segments += [row.num_samples] * count
        for ids, is_target in pieces:
            row.token_ids += ids
            row.is_target += [is_target] * len(ids)
    gap = length - len(row.token_ids)
    row.token_ids += [0] * gap
    row.positions += [0] * gap
    row.segments += [PADDING_SEGMENT] * gap
    row.is_target += [False] * gap
    return row


@dataclass(frozen=True, slots=True)
class RowBatch:
    """B rows of T tokens. position_BT, segment_BT: int64. The loss is on R places: the token at
    (row_R, place_R) of token_id_BT, predicted from the one before it.
    """

    token_id_BT: npt.NDArray[np.int64]
    position_BT: npt.NDArray[np.int64]
    segment_BT: npt.NDArray[np.int64]
    row_R: npt.NDArray[np.int64]
    place_R: npt.NDArray[np.int64]

    def samples(self) -> list[Sample]:
        """The conversations, each with its opening before it."""
        found: list[Sample] = []
        is_target = np.zeros(self.token_id_BT.shape, np.float32)
        is_target[self.row_R, self.place_R] = 1
        for ids, segments, weights in zip(self.token_id_BT, self.segment_BT, is_target, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                chosen = (segments == 0) | (segments == segment)
                found.append(Sample(ids[chosen].astype(np.int32), weights[chosen], len(found)))
        return found

    @property
    def weight(self) -> float:
        """What the batch counts in the mean loss of a step."""
        return float(len(self.row_R))

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.token_id_BT.size


def batch_of_rows(rows: Sequence[Row]) -> RowBatch:
    """Rows of one length as a batch."""
    is_target = np.array([row.is_target for row in rows])
    is_target[:, 0] = False  # nothing comes before the first token
    row_R, place_R = np.nonzero(is_target)
    return RowBatch(
        np.array([row.token_ids for row in rows], np.int64),
        np.array([row.positions for row in rows], np.int64),
        np.array([row.segments for row in rows], np.int64),
        row_R,
        place_R,
    )


def samples_of_rows(batches: Iterable[RowBatch]) -> list[Sample]:
    """The conversations of all batches, as data in files would give them."""
    return [sample for batch in batches for sample in batch.samples()]
