"""Which experts are in memory when not all of them fit: places for some, and who has to go.

An expert is one unit: both matrices with their scales, read together to one slot. Steps go through the layers
in turn, so what a layer has just used is wanted again only a whole step later: ages count in steps of the
expert's own layer, and between equals the one that is wanted last goes first. (Least recently used, counted
over all layers, would evict what the next layers need: with a quarter of the experts in memory a prompt would
find none of them there.)

Source: the score is LRFU's, Lee et al. 2001 (IEEE Transactions on Computers 50:12);
benchmarks/expert_cache.py measures it against other rules on recorded routes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.expert_pieces import ExpertPieces
from harmonium.model.direct_reads import DirectReader, Range, Ticket, aligned
from harmonium.model.streaming_memory import ALIGNMENT

DECAY_PER_STEP = 1 / 16
"""Halvings of a use's weight in a step of its layer (measured, docs/performance.md)."""

_NOWHERE = -1


@dataclass(slots=True)
class ExpertCounts:
    """What a cache did so far. An expert that a layer needs in a step counts once, with all its tokens.

    hits: it was there. late_hits: it was being read ahead. misses: it had to be asked for. guesses: read, or
    begun, ahead of need; true_guesses: those that were then needed. bytes_read: from the disk, wrong guesses
    too. wait_seconds: that steps stood still for reads.
    """

    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    guesses: int = 0
    true_guesses: int = 0
    bytes_read: int = 0
    wait_seconds: float = 0.0


@dataclass(slots=True)
class _Slot:
    """Memory for one expert. ticket: of its read; None: nothing is there."""

    layer: int = 0
    expert: int = 0
    ticket: Ticket | None = None


class ExpertCache:
    """Slots for experts of all layers in one piece of memory, filled by a DirectReader.

    place_EC: for each layer, where in `pool` each expert's parts begin (kernels.streamed); true of the
    experts that `use` has just given. One thread at a time.
    """

    def __init__(
        self, layers: Sequence[ExpertPieces], num_experts: int, num_slots: int, slot_bytes: int
    ) -> None:
        """Takes num_slots * slot_bytes of memory, as slots are used. Raises CheckpointError, MemoryError."""
        assert num_slots >= 1 and slot_bytes % ALIGNMENT == 0
        # Here: statistics know this module, and engines without kernels have statistics.
        from harmonium.kernels.matmul import allocate

        assert slot_bytes >= max(map(_most_bytes, layers)), "an expert does not fit a slot"
        self._layers = list(layers)
        self._slot_bytes = slot_bytes
        self.pool = aligned(allocate(num_slots * slot_bytes + ALIGNMENT), num_slots * slot_bytes)
        files: set[Path] = {piece.file for layer in layers for piece in layer.pieces}
        self._reader = DirectReader(sorted(files), self.pool)
        self.place_EC = [np.full((num_experts, 4), _NOWHERE, np.int64) for _ in layers]
        self._slots = [_Slot() for _ in range(num_slots)]
        self._free = list(range(num_slots - 1, -1, -1))
        self._ending: list[int] = []  # cancelled, and not over yet
        self._guesses: set[int] = set()
        self._slot_of: dict[tuple[int, int], int] = {}
        shape = len(layers), num_experts
        self._score: npt.NDArray[np.float64] = np.full(shape, -np.inf)
        self._last: npt.NDArray[np.int64] = np.zeros(shape, np.int64)
        self._clock: npt.NDArray[np.int64] = np.zeros(len(layers), np.int64)
        self._most: npt.NDArray[np.float64] = np.zeros(len(layers))  # what a score could be, not in log2
        # By slot, for choosing quickly:
        self._owner = np.zeros((num_slots, 2), np.int64)
        self._may_go = np.zeros(num_slots, bool)
        self._counts = ExpertCounts()

    @property
    def nbytes(self) -> int:
        """Memory of the slots."""
        return self.pool.nbytes

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the system's page cache."""
        return self._reader.is_direct

    @property
    def counts(self) -> ExpertCounts:
        counts = self._counts
        counts.bytes_read = self._reader.bytes_read
        return counts

    def use(
        self,
        layer: int,
        experts: npt.NDArray[Any],
        num_tokens: npt.NDArray[Any],
        guess: Callable[[], None] | None = None,
    ) -> Generator[list[int], None, None]:
        """Give the experts of a layer group by group, as they come; those of a group stay until the next.

        num_tokens: how many tokens each has. guess: called once the reads are queued. What is there comes at
        once, so that it is multiplied while the rest is read. An expert is read once in a call, whatever the
        number of slots. Raises CheckpointError when one cannot be read.
        """
        self._note(layer, experts, num_tokens)
        order = np.argsort(-num_tokens, kind="stable")
        waiting: dict[int, int] = {}
        missing = [int(expert) for expert in experts[order]]
        given: list[int] = []
        try:
            missing = [expert for expert in missing if not self._keep_present(layer, expert, waiting)]
            self._drop_guesses(layer)
            self._counts.misses += len(missing)
            while waiting or missing:
                missing = self._ask(layer, missing, waiting)
                if guess is not None:
                    guess()
                    guess = None
                given = self._take_ready(waiting)
                if given:
                    yield given
                    self._release(layer, given)
                    given = []
        finally:
            self._release(layer, [*given, *waiting])

    def guess(self, layer: int, experts: Sequence[int], limit: int) -> None:
        """Begin to read experts that a layer will probably want, the likeliest first, as far as slots go.

        They are kept until the layer's `use`; those that it does not want are dropped then. limit: most of
        them.
        """
        self._collect()
        for expert in experts:
            index = self._slot_of.get((layer, expert))
            if index is not None:
                continue
            if limit <= 0 or (index := self._free_slot(layer, spare=layer)) is None:
                return
            limit -= 1
            self._counts.guesses += 1
            self._read(index, layer, expert, urgent=False)
            self._guesses.add(index)
            self._keep(index, True)

    def close(self) -> None:
        """End the reads and close the files. The memory goes with the last view of it."""
        self._reader.close()

    def _note(self, layer: int, experts: npt.NDArray[Any], num_tokens: npt.NDArray[Any]) -> None:
        """A step of this layer uses experts: raise their scores."""
        self._clock[layer] += 1
        now = self._clock[layer]
        age = (now - self._last[layer, experts]) * DECAY_PER_STEP
        # log2 keeps counts of long prompts from outweighing every answer after them.
        gained = np.log2(1.0 + num_tokens)
        self._score[layer, experts] = np.log2(np.exp2(self._score[layer, experts] - age) + gained)
        self._last[layer, experts] = now
        most = self._most[layer] * 2**-DECAY_PER_STEP + np.log2(1.0 + num_tokens.sum())
        self._most[layer] = most

    def _keep_present(self, layer: int, expert: int, waiting: dict[int, int]) -> bool:
        """Whether the expert is there or on its way; it is then kept, and in `waiting` with its slot."""
        index = self._slot_of.get((layer, expert))
        if index is None:
            return False
        slot = self._slots[index]
        ticket = slot.ticket
        assert ticket is not None
        if ticket.error is not None and ticket.is_over:
            self._empty(index)
            return False
        if ticket.is_over:
            self._counts.hits += 1
        else:
            self._counts.late_hits += 1
            self._reader.hurry(ticket)
        if index in self._guesses:
            self._guesses.remove(index)
            self._counts.true_guesses += 1
        waiting[expert] = index
        self._keep(index, True)
        return True

    def _drop_guesses(self, layer: int) -> None:
        """Guesses for this layer that did not come true."""
        for index in [index for index in self._guesses if self._slots[index].layer == layer]:
            self._drop(index)

    def _drop(self, index: int) -> None:
        slot = self._slots[index]
        assert slot.ticket is not None
        self._guesses.remove(index)
        self._keep(index, False)
        if not slot.ticket.is_over:
            self._reader.cancel(slot.ticket)
            del self._slot_of[slot.layer, slot.expert]
            self.place_EC[slot.layer][slot.expert] = _NOWHERE
            self._may_go[index] = False
            self._ending.append(index)

    def _ask(self, layer: int, missing: list[int], waiting: dict[int, int]) -> list[int]:
        """Queue reads of missing experts while there are slots; those that have to wait for one."""
        self._collect()
        for done, expert in enumerate(missing):
            index = self._free_slot(layer)
            if index is None:
                if not waiting:
                    self._wait_for_slot()
                return missing[done:]
            self._read(index, layer, expert, urgent=True)
            self._keep(index, True)
            waiting[expert] = index
        return []

    def _take_ready(self, waiting: dict[int, int]) -> list[int]:
        """Of those waited for, the ones that are there now; waits for one. Raises CheckpointError."""
        if not waiting:
            return []
        tickets = {expert: self._ticket(index) for expert, index in waiting.items()}
        if not any(ticket.is_over for ticket in tickets.values()):
            start = time.perf_counter()
            self._reader.wait_any(tickets.values())
            self._counts.wait_seconds += time.perf_counter() - start
        group = []
        for expert, ticket in tickets.items():
            if ticket.is_over:
                if ticket.error is not None:
                    raise ticket.error
                group.append(expert)
                del waiting[expert]
        return group

    def _ticket(self, index: int) -> Ticket:
        ticket = self._slots[index].ticket
        assert ticket is not None
        return ticket

    def _release(self, layer: int, experts: list[int]) -> None:
        for expert in experts:
            index = self._slot_of.get((layer, expert))
            if index is None:
                continue
            ticket = self._ticket(index)
            self._keep(index, False)
            if ticket.error is not None and ticket.is_over:
                self._empty(index)

    def _keep(self, index: int, is_kept: bool) -> None:
        self._may_go[index] = not is_kept

    def _read(self, index: int, layer: int, expert: int, urgent: bool) -> None:
        """Fill a slot that is free."""
        slot = self._slots[index]
        slot.layer, slot.expert = layer, expert
        self._owner[index] = layer, expert
        self._slot_of[layer, expert] = index
        ranges = expert_ranges(self._layers[layer], expert, index * self._slot_bytes)
        for piece, item in zip(self._layers[layer].pieces, ranges, strict=True):
            self.place_EC[layer][expert, piece.column] = item.at
        slot.ticket = self._reader.submit(ranges, urgent)

    def _free_slot(self, layer: int, spare: int = -1) -> int | None:
        """A slot for an expert of `layer`, emptied if need be; None where all are in use.

        spare: no expert of this layer is to go.
        """
        if self._free:
            return self._free.pop()
        may_go = self._may_go & (self._owner[:, 0] != spare) if spare >= 0 else self._may_go
        candidates = np.flatnonzero(may_go)
        if not len(candidates):
            return None
        owner = self._owner[candidates]
        layers, experts = owner[:, 0], owner[:, 1]
        age = self._clock[layers] - self._last[layers, experts]
        until = (layers - layer - 1) % len(self._layers)
        # As a share of what it could be, for layers that this step has passed have had one use more.
        share = self._score[layers, experts] - age * DECAY_PER_STEP - np.log2(self._most[layers] + 1e-9)
        value = share - 1e-6 * until
        for at in np.argsort(value):
            index = int(candidates[at])
            if self._ticket(index).is_over:
                self._empty(index)
                return self._free.pop()
        return None

    def _empty(self, index: int) -> None:
        slot = self._slots[index]
        self._slot_of.pop((slot.layer, slot.expert), None)
        self.place_EC[slot.layer][slot.expert] = _NOWHERE
        self._slots[index] = _Slot()
        self._guesses.discard(index)
        self._may_go[index] = False
        self._free.append(index)

    def _collect(self) -> None:
        """Slots of cancelled reads that are over are free."""
        for index in [index for index in self._ending if self._ticket(index).is_over]:
            self._ending.remove(index)
            self._slots[index] = _Slot()
            self._free.append(index)

    def _wait_for_slot(self) -> None:
        """Nothing is given out and no slot is free: reads that nobody wants must end first."""
        for index in list(self._guesses):
            self._drop(index)
        self._collect()
        running = [slot.ticket for slot in self._slots if slot.ticket is not None and not slot.ticket.is_over]
        if not self._free and not self._may_go.any() and running:
            self._reader.wait_any(running)
            self._collect()


def expert_ranges(layer: ExpertPieces, expert: int, at: int) -> list[Range]:
    """What to read for an expert, piece by piece, to memory from `at` (a multiple of ALIGNMENT) on."""
    ranges = []
    for piece in layer.pieces:
        offset = piece.offset + expert * piece.nbytes
        begin = at + offset % ALIGNMENT
        ranges.append(Range(piece.file, offset, piece.nbytes, begin))
        at = -(-(begin + piece.nbytes) // ALIGNMENT) * ALIGNMENT
    return ranges


def _most_bytes(layer: ExpertPieces) -> int:
    """Of one expert, whatever its pieces' places within a block."""
    return sum(-(-piece.nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT for piece in layer.pieces)
