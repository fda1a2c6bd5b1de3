"""A layer's experts when not all of them are in memory: computed as they come from the disk.

The products and their order are those of experts that are mapped, so the numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.checkpoint import Checkpoint
from harmonium.checkpoint.expert_pieces import expert_pieces
from harmonium.config import Weights
from harmonium.kernels.matmul import ExpertAdapter
from harmonium.kernels.ops import rms_norm, router
from harmonium.kernels.streamed import add_moe_parts, moe_parts
from harmonium.model.expert_cache import ExpertCache
from harmonium.model.guesses import GuessRecord
from harmonium.model.streaming_memory import GUESS_ROWS, slot_bytes

FloatArray = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint16]

GUESSES_PER_STEP = 32
"""Most experts that are read ahead of a layer: what the disk gives while a long prompt's attention runs."""


class ExpertStream:
    """What the layers of a model share: the cache, and memory for the parts of a step's results."""

    def __init__(self, source: Checkpoint, weights: Weights, num_slots: int, max_batch_tokens: int) -> None:
        """num_slots: experts that are in memory at a time. Raises CheckpointError, MemoryError."""
        assert source.expert_format == "mxfp4", "only MXFP4 experts are streamed"
        config = source.config
        self.source = source
        self.config = config
        self.activations: Weights = weights
        self.layers = [expert_pieces(source, layer) for layer in range(config.num_layers)]
        self.cache = ExpertCache(self.layers, config.num_experts, num_slots, slot_bytes(config))
        self.guesses = GuessRecord()
        T, A, D = max_batch_tokens, config.num_active_experts, config.hidden_size
        self.parts_TAD: FloatArray = np.zeros((T, A, D), np.float32)
        rows = min(GUESS_ROWS, T)
        self.normed_RD: FloatArray = np.zeros((rows, D), np.float32)
        self.expert_id_RA: npt.NDArray[np.int32] = np.zeros((rows, A), np.int32)
        self.expert_weight_RA: FloatArray = np.zeros((rows, A), np.float32)

    @property
    def scratch_bytes(self) -> int:
        """Memory beside the cache."""
        arrays = self.parts_TAD, self.normed_RD, self.expert_id_RA, self.expert_weight_RA
        return sum(array.nbytes for array in arrays)


class StreamedExperts:
    """Experts of one layer. Called as weights.Experts is."""

    __slots__ = ("_bias", "_layer", "_next", "_stream", "mapped")

    def __init__(self, stream: ExpertStream, layer: int) -> None:
        name = f"layers.{layer}.experts"
        self._stream = stream
        self._layer = layer
        # Copies: a page that the system takes back would be read by a step, one fault at a time.
        self._bias: tuple[Bits, Bits] = (
            np.array(stream.source.tensor(f"{name}.gate_up.bias")),
            np.array(stream.source.tensor(f"{name}.down.bias")),
        )
        self.mapped: tuple[npt.NDArray[Any], ...] = self._bias
        self._next: tuple[Bits, Bits, Bits] | None = None

    def guess_with(self, norm_D: Bits, router_weight_ED: Bits, router_bias_E: Bits) -> None:
        """From now on guess the next layer's experts: this is its norm before them, and its router."""
        self._next = norm_D, router_weight_ED, router_bias_E

    def __call__(
        self,
        x_TD: FloatArray,
        expert_id_TA: npt.NDArray[np.int32],
        weight_TA: FloatArray,
        out_TD: FloatArray,
        adapters: Sequence[ExpertAdapter] | None = None,
        adapter_T: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Adds the weighted sum of the chosen experts to out, which holds the tokens' hidden state.

        Raises CheckpointError when an expert cannot be read; out is unchanged then.
        """
        stream, layer = self._stream, self._layer
        cache, config = stream.cache, stream.config
        parts_TAD = stream.parts_TAD[: len(x_TD)]
        experts, num_tokens = np.unique(expert_id_TA, return_counts=True)
        stream.guesses.judge(layer, experts)
        is_given = np.zeros(config.num_experts, bool)
        with closing(cache.use(layer, experts, num_tokens, lambda: self._guess(out_TD))) as groups:
            for group in groups:
                is_given[:] = False
                is_given[group] = True
                moe_parts(
                    x_TD,
                    np.where(is_given[expert_id_TA], expert_id_TA, np.int32(-1)),
                    weight_TA,
                    cache.pool,
                    cache.place_EC[layer],
                    stream.layers[layer].ggml,
                    *self._bias,
                    parts_TAD,
                    config.swiglu_limit,
                    config.swiglu_alpha,
                    stream.activations,
                    adapters,
                    adapter_T,
                )
        add_moe_parts(parts_TAD, out_TD)

    def _guess(self, hidden_TD: FloatArray) -> None:
        """Read ahead what the next layer's router would choose for the hidden state as it is now.

        What this layer's experts and the next attention will add is missing in it, and so are adapters.
        """
        if self._next is None:
            return
        stream, (norm_D, weight_ED, bias_E) = self._stream, self._next
        rows_RD = hidden_TD[:: -(-len(hidden_TD) // len(stream.normed_RD))]
        num_rows = len(rows_RD)
        normed_RD, id_RA = stream.normed_RD[:num_rows], stream.expert_id_RA[:num_rows]
        rms_norm(np.ascontiguousarray(rows_RD), norm_D, stream.config.rms_norm_eps, normed_RD)
        weight_RA = stream.expert_weight_RA[:num_rows]
        router(normed_RD, weight_ED, bias_E, id_RA, weight_RA)
        chance_E = np.bincount(id_RA.ravel(), weight_RA.ravel(), stream.config.num_experts)
        likeliest = np.argsort(-chance_E, kind="stable")[: np.count_nonzero(chance_E)]
        chosen = stream.guesses.choose(self._layer + 1, likeliest, len(hidden_TD))
        stream.cache.guess(self._layer + 1, chosen, GUESSES_PER_STEP)
