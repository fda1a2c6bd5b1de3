"""Decoding steps recorded as CUDA graphs: launched at once, where Python would launch a thousand kernels.

A step that decodes one token for each of some sequences launches the same kernels whatever the numbers are,
if the attention is cut alike. So contexts are cut for the next power of two of blocks, and a recording holds
for every step with as many sequences and as many blocks. What differs lies in LastingInputs.

A recording is not trusted: its first result must be that of the same step without it. If it is not, or the
recording fails, steps go on without recordings and the log says why.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from harmonium.model.batch import Batch
from harmonium.model.torch_step import LastingInputs, StepInputs

_log = logging.getLogger("harmonium.engine")

MAX_RECORDED_TOKENS = 64
"""Larger steps take so long that launches do not count."""

MAX_CHECKED_TOKENS = 9
"""Of one sequence in a recorded step: its last token and as many guesses as are usual (engine/drafts.py)."""

MAX_RECORDINGS = 48
"""Kept at a time; the one that was not used for longest goes."""

LEAST_BLOCKS = 8
"""Of the shortest recordings: contexts up to 256 tokens share one."""

_TOLERANCE = 2**-6
"""Of the largest logit. The kernels are the same; a library may still choose another product for a size."""

Compute = Callable[[StepInputs], Tensor]


class Recording(Protocol):
    """A function's launches, which can be repeated; the result lies where it lay."""

    def record(self, function: Callable[[], Tensor]) -> Tensor: ...

    def replay(self) -> None: ...


class CudaRecording:
    """torch.cuda.CUDAGraph. beside: shares its memory for what lies between: one of them runs at a time."""

    def __init__(self, beside: CudaRecording | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._beside = beside

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        # The memory lives as long as a graph that uses it, so a name of its own could outlive it.
        pool: Any = None if self._beside is None else self._beside._graph.pool()
        self._beside = None
        # Another thread may use the card meanwhile: only what this one does is recorded, or forbidden.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self._graph.replay()


def recorded_blocks(batch: Batch) -> int:
    """Blocks of a sequence that a step's recording has room for; 0: such a step is not recorded."""
    num_tokens, num_sequences = len(batch.token_id_T), len(batch.context_length_S)
    # Of guessed tokens that are checked, those of one sequence: more would be too many different steps.
    is_alike = num_tokens == num_sequences or (num_sequences == 1 and num_tokens <= MAX_CHECKED_TOKENS)
    if not is_alike or num_tokens > MAX_RECORDED_TOKENS:
        return 0
    if not np.array_equal(batch.logit_row_R, np.arange(num_tokens)):
        return 0  # a piece of a prompt
    return int(max(LEAST_BLOCKS, 1 << (batch.full_block_SB.shape[1] - 1).bit_length()))


@dataclass(slots=True)
class _Step:
    recording: Recording
    places: LastingInputs
    logits_RV: Tensor
    host_RV: Tensor


class StepGraphs:
    """The recordings of a runner. compute: a step on the device, which must not wait for it. recording: makes
    an empty one, beside one that there is already, or None.
    """

    def __init__(
        self, compute: Compute, device: torch.device, recording: Callable[[Any], Recording] = CudaRecording
    ) -> None:
        self._compute, self._device, self._recording = compute, device, recording
        self._steps: OrderedDict[tuple[int, ...], _Step | None] = OrderedDict()
        self._is_off = False

    def logits(self, num_blocks: int, inputs: StepInputs) -> Tensor:
        """Logits [R, V], float32 on the host, valid until the next step.

        num_blocks: from recorded_blocks. inputs: on the host. A kind of step is recorded when it comes for
        the second time: the first has compiled its kernels.
        """
        key = (num_blocks, *(len(tiles.tile_X4) for tiles in inputs.tiles.values()), len(inputs.token_id_T))
        step = self._steps.get(key)
        if self._is_off or key not in self._steps:
            self._keep(key, None)
            return self._compute(inputs.to(self._device)).float().cpu()
        if step is None:
            step = self._record(inputs)
            if step is None:
                return self._compute(inputs.to(self._device)).float().cpu()
        else:
            step.places.fill(inputs)
            step.recording.replay()
        self._keep(key, step)
        step.host_RV.copy_(step.logits_RV)
        return step.host_RV

    def close(self) -> None:
        """Give the recordings' memory back."""
        self._steps.clear()

    def _keep(self, key: tuple[int, ...], step: _Step | None) -> None:
        self._steps[key] = step
        self._steps.move_to_end(key)
        if len(self._steps) > MAX_RECORDINGS:
            self._steps.popitem(last=False)

    def _record(self, inputs: StepInputs) -> _Step | None:
        """A recording that has been run once; None: it cannot be done here, from now on."""
        beside = next((step.recording for step in self._steps.values() if step is not None), None)
        places, recording = LastingInputs(inputs, self._device), self._recording(beside)
        # float32 here: the host's copy is one transfer, and no launch is left outside.
        expected = self._compute(places.inputs).float()
        try:
            found = recording.record(lambda: self._compute(places.inputs).float())
            recording.replay()
            largest = float((found - expected).abs().max() / expected.abs().max())
        except RuntimeError as error:
            self._give_up(" ".join(str(error).split())[:200])
            return None
        if largest > _TOLERANCE:  # where the model gives NaN, so does the comparison, and the sampler says it
            self._give_up(f"the recorded step was off by {largest:.2g} of the largest logit")
            return None
        host_RV = torch.empty(found.shape, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        return _Step(recording, places, found, host_RV)

    def _give_up(self, reason: str) -> None:
        self._is_off = True
        self._steps.clear()
        _log.warning("decoding goes on without CUDA graphs: %s", reason)
