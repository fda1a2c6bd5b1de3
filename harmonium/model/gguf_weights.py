"""What of a GGUF file the native runner takes otherwise: ggml's experts, Q8_0 matrices and embedding."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.gguf_blocks import decode_q8
from harmonium.checkpoint.gguf_checkpoint import GgmlExperts, GgufCheckpoint
from harmonium.config import Weights
from harmonium.kernels.gguf import moe_ggml, panels_of_q8, q8_to_bf16, read_ggml
from harmonium.kernels.matmul import (
    ExpertAdapter,
    Int8Weight,
    allocate,
    moe_packed,
    pack_mxfp4,
    packed_shape,
)
from harmonium.model.pages import bring_in

FloatArray = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def matrix(source: GgufCheckpoint, name: str) -> npt.NDArray[np.uint16]:
    """A dense matrix as bf16 bits: a view where the file has BF16, else new memory."""
    rows, kind = source.stored_rows(name)
    bits: npt.NDArray[np.uint16] = q8_to_bf16(rows) if kind == "Q8_0" else source.tensor(name)
    return bits


def int8_matrix(source: GgufCheckpoint, names: Iterable[str]) -> Int8Weight | None:
    """Dense matrices, one below the other, with the file's int8 numbers; None unless all are Q8_0."""
    stored = [source.stored_rows(name) for name in names]
    if any(kind != "Q8_0" for _, kind in stored):
        return None
    parts = [rows for rows, _ in stored]
    return panels_of_q8(parts[0] if len(parts) == 1 else np.concatenate(parts))


def embedding(source: GgufCheckpoint, name: str) -> npt.NDArray[Any]:
    """The table that steps take rows of: bf16 bits [V, D], or Q8_0 rows uint8 [V, 34 D/32] where they lie."""
    rows, kind = source.stored_rows(name)
    return rows if kind == "Q8_0" else source.tensor(name)


def gather_q8(rows: U8, token_id_T: npt.NDArray[np.int32], out_TD: FloatArray) -> None:
    """Write the rows of tokens to out."""
    out_TD[...] = decode_q8(rows[token_id_T])


class GgufExperts:
    """All experts of a layer where they lie in a GGUF file, or packed once `pack` has run (see Experts)."""

    __slots__ = ("_activations", "_bias", "_down", "_gate_up", "_limits", "_packed", "_source", "mapped")

    def __init__(self, source: GgufCheckpoint, name: str, weights: Weights) -> None:
        self._source = source
        self._packed: tuple[U8, U8] | None = None
        self._activations: Weights = weights
        self._limits = (source.config.swiglu_limit, source.config.swiglu_alpha)
        self._gate_up = source.ggml_experts(f"{name}.gate_up")
        self._down = source.ggml_experts(f"{name}.down")
        self._bias = source.tensor(f"{name}.gate_up.bias"), source.tensor(f"{name}.down.bias")
        matrices = (self._gate_up.first, self._gate_up.second, self._down.first)
        self.mapped: tuple[Any, ...] = (*(part for part in matrices if part is not None), *self._bias)

    def pack(self, stop: threading.Event) -> None:
        """As weights.Experts.pack."""
        assert self._activations == "int8", "only int8 activations take packed experts"
        try:
            gate_up, down = _pack(self._gate_up, stop), _pack(self._down, stop)
        except MemoryError:
            return
        if not stop.is_set():
            self._packed = gate_up, down
            self._source.advise([*self._gate_up.names, *self._down.names], "dontneed")

    def __call__(
        self,
        x_TD: FloatArray,
        expert_id_TA: npt.NDArray[np.int32],
        weight_TA: FloatArray,
        out_TD: FloatArray,
        adapters: Sequence[ExpertAdapter] | None = None,
        adapter_T: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Adds the weighted sum of the chosen experts to out; what adapters add to them is in it."""
        routes = x_TD, expert_id_TA, weight_TA
        gate_up_bias, down_bias = self._bias
        packed = self._packed
        if packed is not None:
            gate_up, down = packed
            moe_packed(
                *routes, gate_up, gate_up_bias, down, down_bias, out_TD, *self._limits, adapters, adapter_T
            )
            return
        pair = self._gate_up
        moe_ggml(
            *routes,
            pair.first,
            pair.second,
            pair.is_split,
            gate_up_bias,
            self._down.first,
            down_bias,
            out_TD,
            *self._limits,
            self._activations,
            adapters,
            adapter_T,
        )


def _pack(experts: GgmlExperts, stop: threading.Event) -> U8:
    """The packed tiles [E, tiles, bytes] of all experts; undefined once stop is set."""
    num_experts, num_rows, row_bytes = experts.first.shape
    tiles, size = packed_shape(num_rows * (1 if experts.second is None else 2), row_bytes // 17 * 32)
    packed = allocate(num_experts * tiles * size).reshape(num_experts, tiles, size)
    for expert in range(num_experts):
        if stop.is_set():
            break
        second = None if experts.second is None else experts.second[expert]
        for rows in (experts.first[expert], second):
            if rows is not None:
                bring_in(rows)
        pack_mxfp4(*read_ggml(experts.first[expert], second, experts.is_split), packed[expert])
    return packed
