"""The memory of a layer's keys and values, and how a block of all layers goes to a file and comes back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.model_config import ModelConfig
from harmonium.config import CACHE_BLOCK_TOKENS, KvCache
from harmonium.kernels.ops import SCALE_GROUP


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of a layer [N, G, P, K]: bf16 bits, or int8 with scales [N, G, P, ceil(K/32)]."""

    key: npt.NDArray[Any]
    value: npt.NDArray[Any]
    key_scale: npt.NDArray[np.uint16] | None = None
    value_scale: npt.NDArray[np.uint16] | None = None

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        """What there is of the four."""
        parts = self.key, self.value, self.key_scale, self.value_scale
        return [part for part in parts if part is not None]


def take_cache(config: ModelConfig, num_blocks: int, kv_cache: KvCache) -> LayerCache:
    """Memory for this many blocks of one layer."""
    rows = num_blocks, config.num_kv_heads, CACHE_BLOCK_TOKENS

    def zeros(width: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        # Written once, so that the memory is there (or refused) now and not in the middle of a request.
        return np.full((*rows, width), 0, dtype)

    K = config.head_size
    if kv_cache == "bf16":
        return LayerCache(zeros(K, np.uint16), zeros(K, np.uint16))
    groups = -(-K // SCALE_GROUP)
    halves = zeros(K, np.int8), zeros(K, np.int8)
    return LayerCache(*halves, zeros(groups, np.uint16), zeros(groups, np.uint16))


def copy_block(layers: Iterable[LayerCache], source: int, target: int) -> None:
    """Keys and values of one block to another."""
    for layer in layers:
        for part in layer.arrays:
            part[target] = part[source]


def read_block(layers: Iterable[LayerCache], block: int) -> bytes:
    """Keys and values of one block as they are held, layer by layer."""
    return b"".join(part[block].tobytes() for layer in layers for part in layer.arrays)


def write_block(layers: Iterable[LayerCache], block: int, data: bytes) -> bool:
    """What `read_block` gave, back into a block; False, and no change, for another number of bytes."""
    parts = [part[block] for layer in layers for part in layer.arrays]
    if len(data) != sum(part.nbytes for part in parts):
        return False
    start = 0
    for part in parts:
        part[...] = np.frombuffer(data, part.dtype, part.size, start).reshape(part.shape)
        start += part.nbytes
    return True
