"""A checkpoint's tensors as the kernels take them: dense weights converted, experts where they lie."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.checkpoint import Checkpoint
from harmonium.checkpoint.gguf_checkpoint import GgufCheckpoint
from harmonium.checkpoint.model_config import LayerKind, ModelConfig
from harmonium.checkpoint.names import EMBEDDING, UNEMBEDDING
from harmonium.checkpoint.safetensors import Advice
from harmonium.config import Weights
from harmonium.kernels.matmul import (
    ExpertAdapter,
    Int8Weight,
    allocate,
    linear_bf16,
    linear_int8,
    moe_bf16,
    moe_mxfp4,
    moe_packed,
    pack_mxfp4,
    packed_shape,
    quantize_weight,
)
from harmonium.kernels.ops import gather_rows
from harmonium.kernels.unembedding import quantize_unembedding
from harmonium.model import gguf_weights
from harmonium.model.gguf_weights import GgufExperts, gather_q8
from harmonium.model.pages import bring_in
from harmonium.model.reference import TensorSource
from harmonium.model.streamed_experts import ExpertStream, StreamedExperts
from harmonium.model.unembedding import Unembedding

FloatArray = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.uint16]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while weights are loaded."""


class MappedSource(TensorSource, Protocol):
    """What a runner needs of a checkpoint: views of mapped files, bf16 as uint16 bits, MXFP4 as uint8."""

    def advise(self, names: str | Iterable[str], advice: Advice) -> None:
        """Tell the system that tensors will be read soon, or that their mapped pages may leave memory."""
        ...

    def check_sizes(self) -> None:
        """Raise CheckpointError when a file has become shorter than its map."""
        ...

    def close(self) -> None: ...


class Linear:
    """x @ weight.T + bias with the weight as int8 panels, or as bf16 in the map (then `mapped` holds it).

    A bf16 weight is quantized where `weights` says so; panels are taken as they are.
    """

    __slots__ = ("_bf16", "_bias", "_int8", "mapped", "nbytes")

    def __init__(self, weight_NK: Bits | Int8Weight, bias_N: Bits | None, weights: Weights) -> None:
        self._bias = bias_N
        held = weight_NK
        if weights == "int8" and not isinstance(held, Int8Weight):
            held = quantize_weight(held)
        self._int8 = held if isinstance(held, Int8Weight) else None
        self._bf16 = None if isinstance(held, Int8Weight) else held
        self.mapped: tuple[Bits, ...] = () if self._bf16 is None else (self._bf16,)
        self.nbytes = held.nbytes + (0 if bias_N is None else bias_N.nbytes)

    def __call__(self, x_TK: FloatArray, out_TN: FloatArray, add: bool = False) -> None:
        """Writes out, or adds to it."""
        if self._int8 is not None:
            linear_int8(x_TK, self._int8, self._bias, out_TN, add)
        else:
            assert self._bf16 is not None
            linear_bf16(x_TK, self._bf16, self._bias, out_TN, add)


class Experts:
    """All experts of a layer, as they lie in the files, or packed once `pack` has run."""

    __slots__ = ("_activations", "_arrays", "_is_mxfp4", "_limits", "_names", "_packed", "_source", "mapped")

    def __init__(self, source: MappedSource, name: str, weights: Weights) -> None:
        config = source.config
        self._source = source
        self._packed: tuple[Any, ...] = ()
        halves = ("blocks", "scales") if source.expert_format == "mxfp4" else ()
        self._names = [f"{name}.{half}.{part}" for half in ("gate_up", "down") for part in halves]
        self._is_mxfp4 = source.expert_format == "mxfp4"
        self._activations = weights
        self._limits = (config.swiglu_limit, config.swiglu_alpha)
        parts = ("blocks", "scales", "bias") if self._is_mxfp4 else ("weight", "bias")
        self._arrays: tuple[Any, ...] = tuple(
            source.tensor(f"{name}.{half}.{part}") for half in ("gate_up", "down") for part in parts
        )
        self.mapped = self._arrays

    @property
    def is_packed(self) -> bool:
        """Whether steps use packed tiles from now on."""
        return bool(self._packed)

    def pack(self, stop: threading.Event) -> None:
        """Copy the matrices into packed tiles, for steps from now on; the files' pages leave memory.

        Runs beside steps, which use the files until the layer is done. Stays with them when there is no
        memory, or when `stop` is set meanwhile.
        """
        assert self._is_mxfp4 and self._activations == "int8", "only MXFP4 with int8 activations is packed"
        gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias = self._arrays
        try:
            packed_gate_up = self._pack(gate_up, gate_up_scales, self._names[:2], stop)
            packed_down = self._pack(down, down_scales, self._names[2:], stop)
        except MemoryError:
            return
        if not stop.is_set():
            self._packed = (packed_gate_up, gate_up_bias, packed_down, down_bias)
            self._source.advise(self._names, "dontneed")

    def _pack(self, blocks: Bytes, scales: Bytes, names: list[str], stop: threading.Event) -> Bytes:
        """The packed tiles [E, tiles, bytes] of all experts; undefined once stop is set.

        An expert's pages leave as soon as it is copied, so that a layer is not there twice; a step that needs
        one meanwhile brings it back.
        """
        num_experts, num_outputs, num_blocks, _ = blocks.shape
        tiles, size = packed_shape(num_outputs, num_blocks * 32)
        packed = allocate(num_experts * tiles * size).reshape(num_experts, tiles, size)
        for expert in range(num_experts):
            if stop.is_set():
                break
            bring_in(blocks[expert])
            bring_in(scales[expert])
            pack_mxfp4(blocks[expert], scales[expert], packed[expert])
            if isinstance(self._source, Checkpoint):
                for name in names:
                    self._source.give_back(name, expert)
        return packed

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
        limit, alpha = self._limits
        packed = self._packed
        if packed:
            gate_up, gate_up_bias, down, down_bias = packed
            routes = x_TD, expert_id_TA, weight_TA
            moe_packed(
                *routes, gate_up, gate_up_bias, down, down_bias, out_TD, limit, alpha, adapters, adapter_T
            )
        elif self._is_mxfp4:
            gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias = self._arrays
            moe_mxfp4(
                x_TD,
                expert_id_TA,
                weight_TA,
                gate_up,
                gate_up_scales,
                gate_up_bias,
                down,
                down_scales,
                down_bias,
                out_TD,
                limit,
                alpha,
                self._activations,
                adapters,
                adapter_T,
            )
        else:
            gate_up, gate_up_bias, down, down_bias = self._arrays
            routes = x_TD, expert_id_TA, weight_TA
            weights = gate_up, gate_up_bias, down, down_bias
            moe_bf16(*routes, *weights, out_TD, limit, alpha, adapters, adapter_T)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Small tensors are bf16 bits in the map."""

    kind: LayerKind
    attention_norm_D: Bits
    qkv: Linear
    sink_H: Bits
    out: Linear
    mlp_norm_D: Bits
    router_weight_ED: Bits
    router_bias_E: Bits
    experts: Experts | GgufExperts | StreamedExperts

    @property
    def dense_bytes(self) -> int:
        """All but the experts' matrices."""
        small = (
            self.attention_norm_D,
            self.sink_H,
            self.mlp_norm_D,
            self.router_weight_ED,
            self.router_bias_E,
        )
        biases: int = sum(
            array.nbytes for array in self.experts.mapped if array.dtype == np.uint16 and array.ndim == 2
        )
        return self.qkv.nbytes + self.out.nbytes + sum(array.nbytes for array in small) + biases


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The whole model. embedding_VD: bf16 bits in the map, or Q8_0 rows (uint8); gathered row by row."""

    embedding_VD: npt.NDArray[Any]
    layers: tuple[LayerWeights, ...]
    norm_D: Bits
    unembedding: Unembedding

    def embed(self, token_id_T: npt.NDArray[np.int32], out_TD: FloatArray) -> None:
        """Write the rows of tokens to out."""
        if self.embedding_VD.dtype == np.uint8:
            gather_q8(self.embedding_VD, token_id_T, out_TD)
        else:
            gather_rows(self.embedding_VD, token_id_T, out_TD)

    def mapped(self, packs_experts: bool = False) -> list[npt.NDArray[Any]]:
        """What every step reads from the map, in the order in which it does: the embedding's rows apart.

        packs_experts: their matrices will leave the map.
        """
        arrays: list[npt.NDArray[Any]] = []
        for layer in self.layers:
            experts = (a for a in layer.experts.mapped if not packs_experts or a.dtype == np.uint16)
            arrays += (*layer.qkv.mapped, *layer.out.mapped, *experts)
        return [*arrays, *self.unembedding.mapped]

    @property
    def dense_bytes(self) -> int:
        """All but the experts' matrices and the embedding."""
        return sum(layer.dense_bytes for layer in self.layers) + self.norm_D.nbytes + self.unembedding.nbytes


def load_weights(
    source: MappedSource,
    weights: Weights,
    progress: Progress | None = None,
    stream: ExpertStream | None = None,
) -> ModelWeights:
    """Convert the dense weights; what was converted leaves memory again. The experts' pages are not read yet.

    stream: where experts come from that are not used where they lie; None: they are.

    Raises CheckpointError for a tensor that is missing.
    """
    config = source.config
    done, layer_bytes = 2 * config.vocabulary_size * config.hidden_size, _dense_bytes(config)
    total = done + config.num_layers * layer_bytes
    # First, so that its pages are gone again before the experts come: the peak is then what stays.
    head = _unembedding(source, weights)
    if weights == "int8":
        source.advise(UNEMBEDDING, "dontneed")
    layers = []
    for layer in range(config.num_layers):
        if progress is not None:
            progress(done, total)
        if layer + 1 < config.num_layers:
            # The disk reads ahead while this layer is converted.
            source.advise(_dense_names(layer + 1), "willneed")
        layers.append(_load_layer(source, layer, weights, stream))
        done += layer_bytes
    if progress is not None:
        progress(done, total)
    _connect(layers)
    table: npt.NDArray[Any] = (
        gguf_weights.embedding(source, EMBEDDING)
        if isinstance(source, GgufCheckpoint)
        else source.tensor(EMBEDDING)
    )
    return ModelWeights(table, tuple(layers), source.tensor("norm.weight"), head)


def _matrix(source: MappedSource, name: str) -> Bits:
    """A dense matrix as bf16 bits: a view of the map, where the file has it so."""
    if isinstance(source, GgufCheckpoint):
        return gguf_weights.matrix(source, name)
    return source.tensor(name)


def _unembedding(source: MappedSource, weights: Weights) -> Unembedding:
    if weights == "int8" and isinstance(source, GgufCheckpoint):
        panels = gguf_weights.int8_matrix(source, [UNEMBEDDING])
        if panels is not None:
            return Unembedding(panels)
    matrix = _matrix(source, UNEMBEDDING)
    return Unembedding(quantize_unembedding(matrix) if weights == "int8" else matrix)


def _linear(source: MappedSource, names: Sequence[str], bias_N: Bits | None, weights: Weights) -> Linear:
    """One product for some matrices: their rows are put one below the other."""
    if weights == "int8" and isinstance(source, GgufCheckpoint):
        panels = gguf_weights.int8_matrix(source, names)
        if panels is not None:
            return Linear(panels, bias_N, weights)
    parts = [_matrix(source, name) for name in names]
    return Linear(parts[0] if len(parts) == 1 else np.concatenate(parts), bias_N, weights)


def _connect(layers: Sequence[LayerWeights]) -> None:
    """Streamed experts guess what the layer after theirs will want."""
    for layer, following in pairwise(layers):
        if isinstance(layer.experts, StreamedExperts):
            layer.experts.guess_with(
                following.mlp_norm_D, following.router_weight_ED, following.router_bias_E
            )


def _load_experts(
    source: MappedSource, layer: int, weights: Weights, stream: ExpertStream | None
) -> Experts | GgufExperts | StreamedExperts:
    name = f"layers.{layer}.experts"
    if stream is not None:
        return StreamedExperts(stream, layer)
    if isinstance(source, GgufCheckpoint):
        return GgufExperts(source, name, weights)
    return Experts(source, name, weights)


def _load_layer(
    source: MappedSource, layer: int, weights: Weights, stream: ExpertStream | None
) -> LayerWeights:
    name = f"layers.{layer}"

    def tensor(part: str) -> npt.NDArray[Any]:
        return source.tensor(f"{name}.{part}")

    qkv_names = [f"{name}.attention.{part}.weight" for part in "qkv"]
    bias = np.concatenate([tensor(f"attention.{part}.bias") for part in "qkv"])
    qkv = _linear(source, qkv_names, bias, weights)
    out = _linear(source, [f"{name}.attention.out.weight"], tensor("attention.out.bias"), weights)
    source.advise(qkv_names, "dontneed")
    if weights == "int8":
        source.advise(f"{name}.attention.out.weight", "dontneed")
    return LayerWeights(
        kind=source.config.layer_kinds[layer],
        attention_norm_D=tensor("attention_norm.weight"),
        qkv=qkv,
        sink_H=tensor("attention.sinks"),
        out=out,
        mlp_norm_D=tensor("mlp_norm.weight"),
        router_weight_ED=tensor("router.weight"),
        router_bias_E=tensor("router.bias"),
        experts=_load_experts(source, layer, weights, stream),
    )


def _dense_bytes(config: ModelConfig) -> int:
    """Bytes of a layer's dense matrices in bf16: what progress counts."""
    rows = 2 * config.num_heads + 2 * config.num_kv_heads  # q, k, v, and the columns of out
    return 2 * rows * config.head_size * config.hidden_size


def _dense_names(layer: int) -> list[str]:
    return [f"layers.{layer}.attention.{part}.weight" for part in ("q", "k", "v", "out")]
