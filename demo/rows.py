"""Rows for training: one opening (system and developer message), then as many conversations as fit behind it.

Each conversation goes on from the opening and sees nothing of its neighbors: its positions continue where the
opening ends, and its tokens attend to the opening (segment 0) and to themselves (their own segment). That is
what serving computes, and the long constant opening is paid for once a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from demo.sample import Sample

PADDING_SEGMENT = -1


@dataclass
class Row:
    """token_ids, positions, segments, is_target: one entry a token. is_target: the model writes this token.

    samples: those in the row, the first of them in segment 1.
    """

    token_ids: list[int]
    positions: list[int]
    segments: list[int]
    is_target: list[bool]
    samples: list[Sample] = field(default_factory=list)


def fill_row(opening_ids: list[int], samples: Iterable[Sample], length: int) -> Row:
    """Take samples until one does not fit; that one is dropped."""
    size = len(opening_ids)
    row = Row(list(opening_ids), list(range(size)), [0] * size, [False] * size)
    for segment, sample in enumerate(samples, 1):
        pieces = sample.pieces()
        count = sum(len(ids) for ids, _ in pieces)
        if len(row.token_ids) + count > length:
            break
        row.samples.append(sample)
        row.positions += range(size, size + count)
        row.segments += [segment] * count
        for ids, is_target in pieces:
            row.token_ids += ids
            row.is_target += [is_target] * len(ids)
    return row


def padded(row: Row, length: int) -> Row:
    gap = length - len(row.token_ids)
    row.token_ids += [0] * gap
    row.positions += [0] * gap
    row.segments += [PADDING_SEGMENT] * gap
    row.is_target += [False] * gap
    return row
