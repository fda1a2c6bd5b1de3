"""Data that a program draws while a run goes: `--data MODULE:NAME`. Needs no PyTorch.

NAME is an object (or a function without arguments that gives one) with the methods of `DrawnData`. The module
is imported as Python would from the working folder. `demo/recipe.py` is an example.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from harmonium.errors import ConfigError
from harmonium.finetune.rows import Row, RowBatch, batch_of_rows

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class DrawnData(Protocol):
    """Endless rows, the same for the same numbers."""

    def used_tokens(self) -> Sequence[int]:
        """Token ids that have a row of their own in the vocabulary, ascending; all others share one."""

    def rows(self, step: int, batch: int, seed: int) -> list[Row]:
        """The rows of a batch of a step (both from 0), all of one length."""

    def validation_rows(self) -> list[list[Row]]:
        """The rows of each batch of the validation; none: there is no validation."""

    def initial_vectors(self, used: Sequence[int], width: int) -> npt.NDArray[np.float32] | None:
        """What embedding and unembedding start from, [1 + used, width], the shared row first, root mean
        square 1; None: random.
        """


def is_drawn(data: object) -> bool:
    """Whether the setting names a program and no file."""
    return isinstance(data, str) and bool(_NAME.fullmatch(data)) and not Path(data).exists()


def load_drawn(name: str) -> DrawnData:
    """The object under MODULE:NAME. Raises ConfigError when it is not there or is no such object."""
    module_name, _, attribute = name.partition(":")
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append("")  # last: nothing in the folder stands before an installed package
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"data is {name!r}, which cannot be loaded ({error}); expected MODULE:NAME"
        ) from None
    data = found() if callable(found) else found
    methods = ("used_tokens", "rows", "validation_rows", "initial_vectors")
    missing = [method for method in methods if not callable(getattr(data, method, None))]
    if missing:
        raise ConfigError(
            f"data is {name!r}, which has no method {missing[0]}; expected {', '.join(methods)}"
        )
    return data  # type: ignore[no-any-return]


class DrawnRows:
    """Batches of rows for each step. num_batches: of a step; a process draws only those that it computes."""

    def __init__(self, data: DrawnData, num_batches: int, num_steps: int, seed: int) -> None:
        self._data, self._num_batches, self._seed = data, num_batches, seed
        self.num_steps = num_steps

    def epoch_of(self, step: int) -> int:
        """Always 0."""
        return 0

    def ends_epoch(self, step: int) -> bool:
        """Whether the step is the last of all."""
        return step + 1 == self.num_steps

    def batches(self, step: int, rank: int = 0, world: int = 1) -> list[RowBatch]:
        """Those of the step's batches that process `rank` of `world` computes."""
        indices = range(rank, self._num_batches, world)
        return [batch_of_rows(self._data.rows(step, index, self._seed)) for index in indices]

    def validation(self) -> list[RowBatch]:
        """The batches of the validation."""
        return [batch_of_rows(rows) for rows in self._data.validation_rows()]
