"""Which guesses of a layer's experts are worth a read: those whose like came true of late."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FEW_TOKENS = 8
"""Up to so many tokens a step decodes; more are a prompt's, which want nearly every expert."""

WORTHWHILE = 0.55
"""Chance from which a guess is read: what it reads for nothing holds up what is needed."""

_NUM_RANKS = 8
_WEIGHT = 1 / 32


class GuessRecord:
    """How often guesses came true, by their rank among the guesses of a step: the likeliest of eight first.

    Steps of few tokens and long ones are told apart. A rank that stopped being read goes on being judged.
    """

    def __init__(self) -> None:
        self._chance: npt.NDArray[np.float64] = np.full((2, _NUM_RANKS), WORTHWHILE + 0.1)
        self._open: dict[int, tuple[npt.NDArray[np.int64], int]] = {}

    def choose(self, layer: int, likeliest: npt.NDArray[np.int64], num_tokens: int) -> list[int]:
        """Of a layer's guessed experts, the likeliest first, those that are worth a read."""
        is_long = int(num_tokens > FEW_TOKENS)
        self._open[layer] = likeliest, is_long
        is_worth = self._chance[is_long, _ranks(len(likeliest))] >= WORTHWHILE
        return [int(expert) for expert in likeliest[is_worth]]

    def judge(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """The layer wanted these. Does nothing where none were guessed."""
        guessed, is_long = self._open.pop(layer, (None, 0))
        if guessed is None:
            return
        chance = self._chance[is_long]
        for rank, is_true in zip(_ranks(len(guessed)), np.isin(guessed, experts), strict=True):
            chance[rank] += _WEIGHT * (is_true - chance[rank])


def _ranks(number: int) -> npt.NDArray[np.int64]:
    """Which of the ranks each of so many guesses has."""
    return np.arange(number) * _NUM_RANKS // max(1, number)
