"""Choosing tokens from rows of logits: the typed face of native/sampling.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from harmonium import _native

DrawStatus = Literal["ok", "nan", "nothing_allowed", "out_of_memory"]
_STATUS: tuple[DrawStatus, ...] = ("ok", "nan", "nothing_allowed", "out_of_memory")


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How a token is drawn from one row; reference_sampling.py says what each field does.

    key: 0 to 2^64 - 1, of the draw's random numbers: the same key draws the same token from the same logits.
    num_top: alternatives whose log-probability is reported; -1: report nothing, 0: the chosen token alone.
    prompt_ids, answer_ids, answer_counts, bias_ids: int32; bias: float32; allowed: uint32 words of a bit
    mask.
    """

    key: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    num_top: int = -1
    prompt_ids: npt.NDArray[np.int32] | None = None
    answer_ids: npt.NDArray[np.int32] | None = None
    answer_counts: npt.NDArray[np.int32] | None = None
    bias_ids: npt.NDArray[np.int32] | None = None
    bias: npt.NDArray[np.float32] | None = None
    allowed: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """What came of one row. token_id is -1 unless status is "ok"; logprob is None unless it was asked for.

    top: (token id, log-probability), best first, ties by the lower id; tokens without any probability are
    left out, so there may be fewer than asked for.
    """

    status: DrawStatus
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits_RV: npt.NDArray[np.float32], rows: Sequence[tuple[int, DrawSettings]]) -> list[Draw]:
    """Draw a token for each (row of logits_RV, settings), rows in parallel; logits_RV is not changed.

    Raises ValueError for a setting out of range, a token id outside the vocabulary or a mask that is too
    short, TypeError for an array of another type or layout.
    """
    count = len(rows)
    max_top = max([settings.num_top for _, settings in rows], default=0)
    max_top = max(max_top, 0)
    status = np.empty(count, np.int32)
    token_id = np.empty(count, np.int32)
    logprob = np.empty(count, np.float32)
    top_id = np.empty((count, max_top), np.int32)
    top_logprob = np.empty((count, max_top), np.float32)
    native = [_native_row(row, settings) for row, settings in rows]
    _native.sample(logits_RV, native, status, token_id, logprob, top_id, top_logprob)
    draws = []
    for i, (_, settings) in enumerate(rows):
        found = top_id[i] >= 0
        top = zip(top_id[i][found].tolist(), top_logprob[i][found].tolist(), strict=True) if max_top else ()
        is_reported = settings.num_top >= 0 and status[i] == 0
        draws.append(
            Draw(
                status=_STATUS[status[i]],
                token_id=int(token_id[i]),
                logprob=float(logprob[i]) if is_reported else None,
                top=tuple(top),
            )
        )
    return draws


def sampling_scratch_bytes(vocabulary_size: int, threads: int) -> int:
    """Bytes that sampling keeps between calls, once each thread has sampled a row with all settings."""
    return threads * int(_native.sampling_thread_bytes(vocabulary_size))


def _native_row(row: int, settings: DrawSettings) -> object:
    return _native.SampleRow(
        row,
        settings.key,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        settings.presence_penalty,
        settings.frequency_penalty,
        settings.repetition_penalty,
        settings.num_top,
        settings.prompt_ids,
        settings.answer_ids,
        settings.answer_counts,
        settings.bias_ids,
        settings.bias,
        settings.allowed,
    )
