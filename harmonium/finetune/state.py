"""Saved states of a run: weights, optimizer, position. A folder each, whole or not there; no pickle.

training/step-00000100/state.json             step, settings, best validation, sizes of the data
                       tensors.safetensors    what is trained, the optimizer's state, PyTorch's generator
training/best-00000080/tensors.safetensors    what is trained, at the best validation
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonium.checkpoint.safetensors import SafetensorsFile, write_safetensors
from harmonium.errors import CheckpointError, ConfigError

TRAINING = "training"
KEPT = 2
"""States that are kept: the last, and the one before, should the last be damaged by the disk."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True, slots=True)
class RunState:
    """step: steps that are done. tensors: by name. facts: the rest, as JSON holds it."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class RunFolder:
    """The folder `training` in a run's output. Methods raise ConfigError when the disk refuses."""

    def __init__(self, out: Path) -> None:
        self.path = out / TRAINING

    def save(self, state: RunState) -> Path:
        """Write a state; older ones but for the one before go."""
        folder = self._write("step", state)
        for old in self._folders("step")[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def save_best(self, state: RunState) -> None:
        """Write the best state so far in place of the one before."""
        kept = self._write("best", state)
        for old in self._folders("best"):
            if old != kept:
                shutil.rmtree(old, ignore_errors=True)

    def last(self) -> RunState | None:
        """The newest state that can be read; None where there is none. Raises CheckpointError for damage."""
        folders = self._folders("step")
        if not folders:
            return None
        try:
            return _read(folders[-1])
        except CheckpointError:
            if len(folders) == 1:
                raise
            return _read(folders[-2])

    def best(self, step: int) -> Mapping[str, Tensor]:
        """What was trained at the best validation, which was after `step` steps."""
        return _read(self.path / f"best-{step:08d}").tensors

    def remove(self) -> None:
        """Delete all states: the run is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _folders(self, kind: str) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if path.name.startswith(f"{kind}-"))

    def _write(self, kind: str, state: RunState) -> Path:
        folder = self.path / f"{kind}-{state.step:08d}"
        temporary = self.path / f".{folder.name}.{os.getpid()}.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(".*.tmp"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir()
            write_safetensors(temporary / "tensors.safetensors", _stored(state.tensors.items()))
            text = json.dumps({"step": state.step, **state.facts}, indent=1)
            (temporary / "state.json").write_text(text, encoding="utf-8")
            _to_disk(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise ConfigError(f"{folder}: the state cannot be written ({error.strerror or error})") from None
        return folder


def _to_disk(folder: Path) -> None:
    """Past the system's cache, so that the rename never shows files that a power cut empties."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _stored(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str, np.ndarray[Any, Any]]]:
    return [(name, *as_stored(tensor)) for name, tensor in tensors]


def as_stored(tensor: Tensor) -> tuple[str, np.ndarray[Any, Any]]:
    """(dtype, bits) as `write_safetensors` takes them: float32, bfloat16 or uint8."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return "BF16", plain.view(torch.int16).numpy().view(np.uint16)
    return _DTYPES[plain.dtype], plain.numpy()


def _read(folder: Path) -> RunState:
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        step = facts.pop("step")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: the state cannot be read ({error})") from None
    file = SafetensorsFile(folder / "tensors.safetensors")
    try:
        tensors = {}
        for name, entry in file.entries.items():
            array = np.array(file.view(entry.dtype, entry.shape, entry.offset))
            tensor = torch.from_numpy(array.view(np.int16) if entry.dtype == "BF16" else array)
            tensors[name] = tensor.view(torch.bfloat16) if entry.dtype == "BF16" else tensor
    finally:
        file.close()
    return RunState(step, tensors, facts)
