"""The calls of a decode step's layers, recorded once for each size of step and then repeated without Python.

A step that decodes few tokens spends its time on weights; what lies between two products of it should be as
short as it can be. What changes from step to step lies in the arrays of `StepPlaces`, which are filled anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.model_config import LayerKind
from harmonium.kernels.program import Program
from harmonium.model.batch import Batch

FloatArray = npt.NDArray[np.float32]

MAX_RECORDED_TOKENS = 16
"""Larger steps take so long that Python does not count."""

MAX_PROGRAMS = 16
"""Kept at a time; the one that was not used for longest goes."""


@dataclass(slots=True)
class StepPlaces:
    """Where a step's tokens are: their angles, and their slots and blocks in each kind of cache."""

    cos_TK2: FloatArray
    sin_TK2: FloatArray
    slot_T: dict[LayerKind, npt.NDArray[np.int64]]
    block_SB: dict[LayerKind, npt.NDArray[np.int32]]
    query_start_S1: npt.NDArray[np.int32]
    context_length_S: npt.NDArray[np.int32]

    def lasting(self) -> StepPlaces:
        """Arrays of their own, in which later steps of this size fit; block tables have room to grow."""
        return StepPlaces(
            self.cos_TK2.copy(),
            self.sin_TK2.copy(),
            {kind: slots.copy() for kind, slots in self.slot_T.items()},
            {kind: _wider(blocks) for kind, blocks in self.block_SB.items()},
            self.query_start_S1.copy(),
            self.context_length_S.copy(),
        )

    def take(self, other: StepPlaces) -> None:
        """The numbers of another step of the same size."""
        self.cos_TK2[...] = other.cos_TK2
        self.sin_TK2[...] = other.sin_TK2
        for kind, slots in other.slot_T.items():
            self.slot_T[kind][...] = slots
        for kind, blocks in other.block_SB.items():
            self.block_SB[kind][:, : blocks.shape[1]] = blocks
        self.query_start_S1[...] = other.query_start_S1
        self.context_length_S[...] = other.context_length_S


def _wider(block_SB: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    table = np.full((len(block_SB), _table_width(block_SB.shape[1])), -1, np.int32)
    table[:, : block_SB.shape[1]] = block_SB
    return table


def _table_width(num_blocks: int) -> int:
    """A power of two, so that a growing context seldom needs another program."""
    return max(8, 1 << (num_blocks - 1).bit_length())


@dataclass(slots=True)
class _Recorded:
    program: Program
    places: StepPlaces


@dataclass(slots=True)
class StepPrograms:
    """The programs of one runner. A caller records while nothing else of the runner's runs."""

    _programs: OrderedDict[Hashable, _Recorded] = field(default_factory=OrderedDict)

    def run(
        self, batch: Batch, places: StepPlaces, state: Hashable, layers: Callable[[StepPlaces], None]
    ) -> None:
        """Do what `layers` does with these places, by the program of the step's size, which it makes first.

        state: a program is good for equal ones: what else decides which kernels are called, and with what.
        layers: calls kernels and nothing else, on arrays that last as long as the state.
        """
        widths = tuple(_table_width(blocks.shape[1]) for blocks in places.block_SB.values())
        key = (batch.token_id_T.size, batch.context_length_S.size, widths, state)
        recorded = self._programs.get(key)
        if recorded is None:
            recorded = self._record(places, layers)
            self._programs[key] = recorded
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        else:
            recorded.places.take(places)
            self._programs.move_to_end(key)
        recorded.program.run()

    def clear(self) -> None:
        """Forget all, and the arrays with them."""
        self._programs.clear()

    def _record(self, places: StepPlaces, layers: Callable[[StepPlaces], None]) -> _Recorded:
        recorded = _Recorded(Program(), places.lasting())
        with recorded.program.recording():
            layers(recorded.places)
        return recorded
