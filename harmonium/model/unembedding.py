"""From the last hidden rows to logits: whole rows, or as much of them as the sampler will look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from harmonium.kernels.matmul import F32, Bf16, Int8Weight, linear_bf16, linear_int8
from harmonium.kernels.unembedding import (
    MAX_SCREENED_ROWS,
    SplitWeight,
    Wish,
    count_allowed,
    logits,
    screened_logits,
)
from harmonium.model.batch import RowSampling

MAX_KEPT = 64
"""Most of the greatest logits that are worth finding by screening: the more, the more low halves are read."""

_SPARSE = 1 / 4
"""A mask that allows less than this share is worth looking at: panels of 16 tokens are left out whole."""

_PAYING_SHARE = 0.5
_REST_STEPS = 64


class Unembedding:
    """Logits of hidden rows. mapped: what lies in the map (bf16 alone); nbytes: memory held.

    Split weights can do with less than whole rows (`sampled_logits`). Where that does not pay, as with logits
    that are all alike, it is left off for some steps; the tokens are the same.
    """

    def __init__(self, weight_VD: SplitWeight | Int8Weight | Bf16) -> None:
        self._weight = weight_VD
        self.nbytes: int = weight_VD.nbytes
        is_mapped = not isinstance(weight_VD, SplitWeight | Int8Weight)
        self.mapped: tuple[npt.NDArray[Any], ...] = (weight_VD,) if is_mapped else ()  # type: ignore[assignment]
        self._num_resting = 0

    def __call__(self, x_RD: F32, out_RV: F32) -> None:
        """Write all logits."""
        if isinstance(self._weight, SplitWeight):
            logits(x_RD, self._weight, out_RV)
        elif isinstance(self._weight, Int8Weight):
            linear_int8(x_RD, self._weight, None, out_RV)
        else:
            linear_bf16(x_RD, self._weight, None, out_RV)

    def sampled_logits(self, x_RD: F32, sampling: Sequence[RowSampling | None], out_RV: F32) -> None:
        """Write the logits that `sample_rows` needs for the tokens that it would draw from all of them.

        The others are minus infinity.
        """
        wishes = self._wishes(sampling)
        if wishes is None:
            self(x_RD, out_RV)
            return
        assert isinstance(self._weight, SplitWeight)
        share = screened_logits(x_RD, self._weight, wishes, out_RV)
        if share > _PAYING_SHARE:
            self._num_resting = _REST_STEPS

    def _wishes(self, sampling: Sequence[RowSampling | None]) -> list[Wish] | None:
        """None where whole rows are wanted."""
        if not isinstance(self._weight, SplitWeight) or len(sampling) > MAX_SCREENED_ROWS:
            return None
        if self._num_resting:
            self._num_resting -= 1
            return None
        wishes = [wish for row in sampling if (wish := wish_of(row, self._weight.num_outputs)) is not None]
        return wishes if len(wishes) == len(sampling) else None


def wish_of(row: RowSampling | None, vocabulary_size: int) -> Wish | None:
    """What a row's sampling needs of its logits; None: all of them."""
    if row is None:
        return None
    params, allowed = row.params, row.allowed_mask
    is_ranked = (
        params.logprobs is None
        and not params.logit_bias
        and params.presence_penalty == params.frequency_penalty == 0.0
        and params.repetition_penalty == 1.0
    )
    if is_ranked and params.temperature == 0.0:
        return Wish(1, allowed)
    if is_ranked and 0 < params.top_k <= MAX_KEPT:
        return Wish(params.top_k, allowed)
    if is_ranked and params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return Wish(0, allowed, row.key, params.temperature)
    if allowed is not None and count_allowed(allowed) < _SPARSE * vocabulary_size:
        return Wish(allowed=allowed)
    return None
