"""LoRA adapters in a step: low-rank products for the rows of those sequences that ask for one.

Every product of the base model is computed for all rows as ever; then each adapter adds its own to the rows
of its sequences, from the same inputs in float32. A row without an adapter is not touched, so sequences with
different adapters and with none share a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.lora import LoraAdapter, LowRank
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.kernels.matmul import ExpertAdapter, Pair, low_rank
from harmonium.model.batch import Batch

FloatArray = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int32]

_QKV = ("attention.q", "attention.k", "attention.v")


class AdapterSet:
    """The adapters that a runner holds; a batch names them by their places here. None: an empty place."""

    def __init__(
        self, adapters: Sequence[LoraAdapter | None], config: ModelConfig, max_batch_tokens: int
    ) -> None:
        self.adapters = tuple(adapters)
        self._config, self._max_batch_tokens = config, max_batch_tokens
        q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.columns = {"attention.q": 0, "attention.k": q, "attention.v": q + kv}
        self.experts = [
            [_expert_adapter(adapter.layers[layer] if adapter is not None else {}) for adapter in adapters]
            for layer in range(config.num_layers)
        ]
        num_rows = max_batch_tokens if adapters else 0
        self.router_extra_TE = np.zeros((num_rows, config.num_experts), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        held = sum(adapter.nbytes for adapter in self.adapters if adapter is not None)
        return held + self.router_extra_TE.nbytes

    def changed(self, index: int, adapter: LoraAdapter | None) -> AdapterSet:
        """The set with another adapter, or none, at a place; places before it may be empty."""
        listed = [*self.adapters, *([None] * (index + 1 - len(self.adapters)))]
        listed[index] = adapter
        while listed and listed[-1] is None:
            listed.pop()
        return AdapterSet(listed, self._config, self._max_batch_tokens)

    def layer(self, index: int, layer: int) -> Mapping[str, LowRank]:
        """What an adapter changes in a layer."""
        adapter = self.adapters[index]
        assert adapter is not None, "the batch names a place that is empty"
        return adapter.layers[layer]

    def in_step(self, batch: Batch) -> StepAdapters | None:
        """The adapters of this batch; None where no sequence has one, and nothing needs to be done."""
        if batch.adapter_S is None or batch.adapter_S.max(initial=-1) < 0:
            return None
        assert batch.adapter_S.max() < len(self.adapters), "the batch names an adapter that is not there"
        place_T = np.repeat(batch.adapter_S.astype(np.int32), np.diff(batch.query_start_S1))
        return _step_adapters(self, place_T)


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """The adapters of a step.

    rows: those of each adapter, by its place in the set. adapter_T: the place of each row's among these
    adapters, so that the others cost nothing; -1: none.
    """

    held: AdapterSet
    rows: Mapping[int, Rows]
    adapter_T: Rows

    def keep(self, row_R: Rows) -> StepAdapters | None:
        """For a step that goes on with these rows alone."""
        places = np.array([-1, *self.rows], np.int32)
        adapter_R = places[self.adapter_T[row_R] + 1]
        return _step_adapters(self.held, adapter_R) if adapter_R.max(initial=-1) >= 0 else None

    def add_qkv(self, layer: int, normed_TD: FloatArray, qkv_TN: FloatArray) -> None:
        """Add to queries, keys and values, before they are rotated."""
        for target in _QKV:
            self._add(layer, target, normed_TD, qkv_TN, self.held.columns[target])

    def add_out(self, layer: int, mixed_TN: FloatArray, hidden_TD: FloatArray) -> None:
        """Add to what the output projection added."""
        self._add(layer, "attention.out", mixed_TN, hidden_TD, 0)

    def router_extra(self, layer: int, normed_TD: FloatArray) -> FloatArray | None:
        """What is added to the router's logits, [T, E]; None: nothing."""
        if not any("router" in self.held.layer(index, layer) for index in self.rows):
            return None
        extra_TE = self.held.router_extra_TE[: len(normed_TD)]
        extra_TE.fill(0)
        self._add(layer, "router", normed_TD, extra_TE, 0)
        return extra_TE

    def experts(self, layer: int) -> list[ExpertAdapter] | None:
        """What is added to the experts' products, as adapter_T counts the adapters; None: nothing."""
        adapters = [self.held.experts[layer][index] for index in self.rows]
        return None if all(adapter == (None, None) for adapter in adapters) else adapters

    def _add(self, layer: int, target: str, x_TK: FloatArray, out_TN: FloatArray, column: int) -> None:
        for index, row_X in self.rows.items():
            pair = self.held.layer(index, layer).get(target)
            if pair is not None:
                low_rank(x_TK, row_X, pair.a, pair.b, pair.scale, out_TN, column)


def _step_adapters(held: AdapterSet, place_T: Rows) -> StepAdapters:
    """place_T: each row's place in the set, -1: none."""
    rows: dict[int, Rows] = {}
    adapter_T = np.full_like(place_T, -1)
    for number, place in enumerate(np.unique(place_T[place_T >= 0])):
        rows[int(place)] = np.flatnonzero(place_T == place).astype(np.int32)
        adapter_T[rows[int(place)]] = number
    return StepAdapters(held, rows, adapter_T)


def _expert_adapter(layer: Mapping[str, LowRank]) -> ExpertAdapter:
    def pair(target: str) -> Pair | None:
        found = layer.get(target)
        return None if found is None else (found.a, found.b, found.scale)

    return pair("experts.gate_up"), pair("experts.down")
