"""What `harmonium finetune --config demo/recipe.toml` trains the demo model on, and where it begins."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt

from demo.embedding import structured_embedding
from demo.mixture import EVEN, draw_row, shares_at, used_tokens
from harmonium.finetune.rows import Row

ROWS, ROW_LENGTH = 8, 384
VALIDATION_BATCHES, VALIDATION_SEED = 3, 99


class Recipe:
    """Rows of the generator (harmonium.finetune.drawn.DrawnData). Nothing held out is ever in them."""

    def used_tokens(self) -> Sequence[int]:
        """Token ids that occur in the generator's texts."""
        return used_tokens()

    def rows(self, step: int, batch: int, seed: int) -> list[Row]:
        """Drawn from the three numbers, by the shares of the phase that the step is in."""
        random = Random(seed * 1_000_003 + step * 64 + batch)
        return [draw_row(random, ROW_LENGTH, shares=shares_at(step)) for _ in range(ROWS)]

    def validation_rows(self) -> list[list[Row]]:
        """Of the training's side of the split: the held-out side is looked at when all is done."""
        random = Random(VALIDATION_SEED)
        return [
            [draw_row(random, ROW_LENGTH, shares=EVEN) for _ in range(ROWS)]
            for _ in range(VALIDATION_BATCHES)
        ]

    def initial_vectors(self, used: Sequence[int], width: int) -> npt.NDArray[np.float32]:
        """Numbers and words as sums of codes for their digits and letters."""
        return np.asarray(structured_embedding([-1, *used], width).numpy(), np.float32)
