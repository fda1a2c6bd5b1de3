"""Drives a runner the way an engine does, in a few lines: block tables, chunks, freed window blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.config import CACHE_BLOCK_TOKENS
from harmonium.model.batch import Batch, RowSampling, StepResult
from harmonium.model.runner import Runner

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


@dataclass
class _Sequence:
    length: int = 0
    full: list[int] = field(default_factory=list)
    window: list[int] = field(default_factory=list)


class Driver:
    """Sequences by name; one that begins with a digit has that adapter of the runner's. Blocks are handed out
    in a random order; window blocks that no token can see any more are taken back, overwritten with NaN and
    handed out again.
    """

    def __init__(self, runner: Runner, num_blocks: int = 64, seed: int | None = None) -> None:
        self.runner = runner
        runner.allocate_cache(num_blocks, num_blocks)
        order = np.arange(num_blocks)
        if seed is not None:
            np.random.default_rng(seed).shuffle(order)
        self._free: dict[str, list[int]] = {"full": order.tolist(), "window": order.tolist()}
        self._sequences: dict[str, _Sequence] = {}

    def feed(self, parts: Mapping[str, Tokens], *, free_window: bool = True) -> dict[str, Logits]:
        """One step: logits after each new token of each sequence, [T, V]."""
        result = self.step(parts, free_window=free_window, wants_logits=True)
        assert result.logits_RV is not None
        ends = np.cumsum([len(tokens) for tokens in parts.values()])
        return dict(zip(parts, np.split(result.logits_RV, ends[:-1]), strict=True))

    def step(
        self,
        parts: Mapping[str, Tokens],
        *,
        rows: list[int] | None = None,
        sampling: tuple[RowSampling | None, ...] | None = None,
        wants_logits: bool = False,
        free_window: bool = True,
    ) -> StepResult:
        """rows: of the step's tokens, those that get logits; None: all."""
        for name, tokens in parts.items():
            self._grow(self._sequences.setdefault(name, _Sequence()), len(tokens), free_window)
        sequences = [self._sequences[name] for name in parts]
        lengths = [len(tokens) for tokens in parts.values()]
        position_T = np.concatenate(
            [np.arange(s.length - n, s.length) for s, n in zip(sequences, lengths, strict=True)]
        )
        num_rows = len(position_T) if rows is None else len(rows)
        # A name that begins with a digit asks for the runner's adapter of that number.
        adapter_S = np.array([int(name[0]) if name[:1].isdigit() else -1 for name in parts], np.int32)
        return self.runner.step(
            Batch(
                token_id_T=np.concatenate(list(parts.values())).astype(np.int32),
                position_T=position_T.astype(np.int32),
                query_start_S1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                context_length_S=np.array([s.length for s in sequences], np.int32),
                full_block_SB=_table([s.full for s in sequences]),
                window_block_SB=_table([s.window for s in sequences]),
                logit_row_R=np.arange(num_rows, dtype=np.int32) if rows is None else np.array(rows, np.int32),
                sampling=(None,) * num_rows if sampling is None else sampling,
                wants_logits=wants_logits,
                adapter_S=adapter_S if adapter_S.max() >= 0 else None,
            )
        )

    def run(self, tokens: Tokens, chunk: int, name: str = "") -> Logits:
        """Feed one sequence in chunks: logits after each of its tokens."""
        pieces = [tokens[start : start + chunk] for start in range(0, len(tokens), chunk)]
        return np.concatenate([self.feed({name: piece})[name] for piece in pieces])

    def fork(self, name: str, other: str, num_tokens: int) -> None:
        """A new sequence that begins with another's blocks, as a prefix cache does it."""
        assert num_tokens % CACHE_BLOCK_TOKENS == 0
        num_blocks, source = num_tokens // CACHE_BLOCK_TOKENS, self._sequences[other]
        self._sequences[name] = _Sequence(num_tokens, source.full[:num_blocks], source.window[:num_blocks])

    def _grow(self, sequence: _Sequence, num_tokens: int, free_window: bool) -> None:
        first_seen = max(0, sequence.length - self.runner.config.window + 1) // CACHE_BLOCK_TOKENS
        for index in range(min(first_seen, len(sequence.window)) if free_window else 0):
            if sequence.window[index] >= 0:
                self._poison(sequence.window[index])
                self._free["window"].append(sequence.window[index])
                sequence.window[index] = -1
        sequence.length += num_tokens
        while len(sequence.full) * CACHE_BLOCK_TOKENS < sequence.length:
            sequence.full.append(self._free["full"].pop(0))
            sequence.window.append(self._free["window"].pop(0))

    def _poison(self, block: int) -> None:
        """NaN in bf16, which the scales of int8 are too: a step that reads a freed block cannot go unseen."""
        runner: Any = self.runner
        for kind, cache in zip(runner.config.layer_kinds, runner._caches, strict=True):
            if kind == "window":
                for array in getattr(cache, "arrays", cache):  # TorchRunner's is a pair of tensors
                    if isinstance(array, np.ndarray):
                        array[block] = 0x7FC0 if array.dtype == np.uint16 else 99
                    else:
                        array[block] = float("nan")


def _table(blocks: list[list[int]]) -> npt.NDArray[np.int32]:
    table_SB = np.full((len(blocks), max(map(len, blocks))), -1, np.int32)
    for row, listed in enumerate(blocks):
        table_SB[row, : len(listed)] = listed
    return table_SB
