"""What a step takes to the device: made from its batch on the host, sent together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harmonium.checkpoint.model_config import LayerKind
from harmonium.config import CACHE_BLOCK_TOKENS
from harmonium.model.batch import Batch

_ALIGNMENT = 16
"""Bytes. What begins there may be read as any type, and Triton reads 16 bytes at once from it."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's numbers. slots: where each token's key and value go, in the caches of all layers of a kind.

    row_R: the rows that get logits. tiles: how the Triton kernel cuts the queries (a PagedTiles), else empty.
    """

    token_id_T: Tensor
    cos_TK2: Tensor
    sin_TK2: Tensor
    row_R: Tensor
    slots: Mapping[LayerKind, Tensor]
    tiles: Mapping[LayerKind, Any]

    def map(self, move: Callable[[str, Tensor], Tensor]) -> StepInputs:
        """The same with every tensor replaced; `move` is given a name of its own for each."""
        return StepInputs(
            move("token_id_T", self.token_id_T),
            move("cos_TK2", self.cos_TK2),
            move("sin_TK2", self.sin_TK2),
            move("row_R", self.row_R),
            {kind: move(f"slots.{kind}", slot_T) for kind, slot_T in self.slots.items()},
            {
                kind: replace(
                    tiles,
                    tile_X4=move(f"tiles.{kind}", tiles.tile_X4),
                    table_SB=move(f"table.{kind}", tiles.table_SB),
                )
                for kind, tiles in self.tiles.items()
            },
        )

    def to(self, device: torch.device) -> StepInputs:
        """The same on a device."""
        return self.map(lambda _, tensor: tensor.to(device))


class LastingInputs:
    """Places on a device for the inputs of one kind of step, which later steps of the kind fill anew.

    They lie in one piece of memory, so that a step is one transfer.
    """

    def __init__(self, like: StepInputs, device: torch.device) -> None:
        places: dict[str, tuple[int, Tensor]] = {}
        total = 0

        def place(name: str, tensor: Tensor) -> Tensor:
            nonlocal total
            places[name] = (total, tensor)
            total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            return tensor

        like.map(place)
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=is_cuda)
        self._there = torch.zeros(total, dtype=torch.uint8, device=device)
        self._host_views = {name: _view(self._host, *found) for name, found in places.items()}
        self.inputs = like.map(lambda name, _: _view(self._there, *places[name]))
        self.fill(like)

    def fill(self, inputs: StepInputs) -> None:
        """Send another step's numbers; shapes are those of the first. The step before must be done."""

        def copy(name: str, tensor: Tensor) -> Tensor:
            return self._host_views[name].copy_(tensor)

        inputs.map(copy)
        self._there.copy_(self._host, non_blocking=True)


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def block_table(batch: Batch, kind: LayerKind, width: int = 0) -> npt.NDArray[np.int32]:
    """A kind's block table; width: at least so many blocks of each sequence, those too many are -1."""
    table_SB = batch.full_block_SB if kind == "full" else batch.window_block_SB
    missing = max(0, width - table_SB.shape[1])
    return np.pad(table_SB, ((0, 0), (0, missing)), constant_values=-1) if missing else table_SB


def slots(batch: Batch, kind: LayerKind) -> Tensor:
    """Where each token's key and value go: int64, on the host."""
    table_SB = block_table(batch, kind)
    sequence_T = np.repeat(np.arange(len(table_SB)), np.diff(batch.query_start_S1))
    block_T = table_SB[sequence_T, batch.position_T // CACHE_BLOCK_TOKENS]
    assert block_T.min() >= 0, "a token of the step has no block"
    slot_T = block_T.astype(np.int64) * CACHE_BLOCK_TOKENS + batch.position_T % CACHE_BLOCK_TOKENS
    return torch.from_numpy(slot_T)


def ids(array: npt.NDArray[Any]) -> Tensor:
    """int64, on the host."""
    return torch.from_numpy(array.astype(np.int64))
