"""How fast a checkpoint's disk gives experts: what streaming can expect."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from harmonium.checkpoint.expert_pieces import ExpertPieces
from harmonium.kernels.matmul import allocate
from harmonium.model.direct_reads import DirectReader, Ticket, aligned
from harmonium.model.expert_cache import expert_ranges
from harmonium.model.streaming_memory import ALIGNMENT

_EXPERTS_AHEAD = 4
"""Experts that are asked for at a time: those of a token."""


def measure_disk_rate(layers: Sequence[ExpertPieces], num_experts: int, seconds: float = 1.0) -> float:
    """Bytes a second of experts that are read in random order, as an ExpertCache reads them.

    Past the page cache, where the file system can. Takes the memory of a few experts. Raises CheckpointError.
    """
    rng = np.random.default_rng()
    most = max(sum(piece.nbytes + 2 * ALIGNMENT for piece in layer.pieces) for layer in layers)
    size = -(-most // ALIGNMENT) * ALIGNMENT
    memory = aligned(allocate(_EXPERTS_AHEAD * size + ALIGNMENT), _EXPERTS_AHEAD * size)
    memory[:] = 0
    reader = DirectReader({piece.file for layer in layers for piece in layer.pieces}, memory)

    def submit(slot: int) -> Ticket:
        layer, expert = layers[int(rng.integers(len(layers)))], int(rng.integers(num_experts))
        return reader.submit(expert_ranges(layer, expert, slot * size), urgent=True)

    try:
        running = deque((slot, submit(slot)) for slot in range(_EXPERTS_AHEAD))
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            slot, ticket = running.popleft()
            reader.wait_any([ticket])
            if ticket.error is not None:
                raise ticket.error
            running.append((slot, submit(slot)))
        return reader.bytes_read / elapsed
    finally:
        reader.close()
