"""Tiny random models for this folder's tests: the weights of harmonium.testing, in memory or in files.

The four shapes have pairwise different sizes (the released models have D = F and R = G, so a swapped axis
would pass there), odd vocabularies, every head size that matters (the released one is 64), and windows
shorter and longer than the cache's block of 32 tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.config_json import Layout
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.names import ExpertFormat
from harmonium.testing import make_tiny_checkpoint, random_tensors, tiny_config

PROMPT_LENGTHS = (1, 7, 129, 300, 5000)
"""Within a window, past it, past a tile, and past the released models' original context of 4,096."""


def _sizes(
    *, layers: int, d: int, f: int, h: int, g: int, k: int, e: int, a: int, v: int, window: int
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": d,
        "expert_size": f,
        "num_heads": h,
        "num_kv_heads": g,
        "head_size": k,
        "num_experts": e,
        "num_active_experts": a,
        "vocabulary_size": v,
        "window": window,
    }


SIZES: dict[str, dict[str, Any]] = {
    "narrow": _sizes(layers=6, d=96, f=64, h=12, g=4, k=16, e=5, a=2, v=331, window=8),
    "middle": _sizes(layers=5, d=64, f=96, h=6, g=3, k=32, e=9, a=4, v=257, window=40),
    "tall": _sizes(layers=3, d=128, f=32, h=14, g=7, k=48, e=11, a=3, v=211, window=20),
    "wide": _sizes(layers=4, d=160, f=128, h=10, g=2, k=64, e=8, a=3, v=509, window=128),
}
CONFIGS = {name: tiny_config(**sizes) for name, sizes in SIZES.items()}
ROPE = CONFIGS["narrow"].rope


@dataclass
class TinyCheckpoint:
    """What harmonium.checkpoint.Checkpoint gives a model, held in memory."""

    config: ModelConfig
    tensors: dict[str, npt.NDArray[Any]]
    expert_format: str = "mxfp4"

    def tensor(self, name: str) -> npt.NDArray[Any]:
        return self.tensors[name]

    def advise(self, names: Any, advice: str) -> None:
        """There is no file, so no page may go."""

    def check_sizes(self) -> None:
        """There is no file that somebody could shorten."""

    def close(self) -> None:
        pass

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.tensors[name]).tobytes())
        return digest.hexdigest()


def tiny_checkpoint(name: str, **changes: Any) -> TinyCheckpoint:
    """changes: fields of ModelConfig to replace."""
    config = replace(CONFIGS[name], **changes)
    return TinyCheckpoint(config, dict(random_tensors(config, seed=0)))


def tiny_folder(
    parent: Path, name: str, layout: Layout = "huggingface", experts: ExpertFormat = "mxfp4"
) -> Path:
    """The same weights as files."""
    return make_tiny_checkpoint(
        parent / f"{name}-{layout}-{experts}", layout=layout, experts=experts, **SIZES[name]
    )


def prompt(name: str, length: int) -> npt.NDArray[np.int32]:
    """The same ids every time, whatever NumPy's version; a prompt is not the start of a longer one."""
    raw = np.asarray(np.random.PCG64(1000 + length).random_raw(length))
    return np.asarray(raw % np.uint64(CONFIGS[name].vocabulary_size), dtype=np.int32)


def kept_positions(name: str, length: int) -> list[int]:
    """Positions whose logits the golden file holds: first, window's edge, middle, the last two.

    Of a long prompt every 200th too, so that a median over them means something.
    """
    window = CONFIGS[name].window
    chosen = {0, window - 1, window, length // 2, length - 2, length - 1, *range(100, length, 200)}
    return sorted(position for position in chosen if 0 <= position < length)
