"""The whole model in NumPy. Read this first: every other runner must give these logits.

One sequence, no cache, no batching, plain loops over layers and experts. Weights are read from the checkpoint
as they are needed (bf16 and MXFP4 are exact in float32), so memory stays near one layer's. Arrays carry their
dimension letters as suffixes: T tokens, D model width, V vocabulary, H query heads, G key/value heads,
R = H/G, K head size, E experts, A active experts, F expert width.

Source: openai/gpt-oss gpt_oss/torch/model.py, and Transformers' models/gpt_oss, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.bfloat16 import decode_bfloat16
from harmonium.checkpoint.lora import LoraAdapter
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.mxfp4 import decode_mxfp4
from harmonium.errors import RequestError
from harmonium.model.rope import attention_factor, inverse_frequencies, rope_tables

Array = npt.NDArray[np.floating[Any]]

QUERY_TILE = 256
"""Query rows whose scores are in memory at once: H * 256 * T floats, not H * T * T."""


class TensorSource(Protocol):
    """What the reference needs of a checkpoint (harmonium.checkpoint.Checkpoint has it)."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def expert_format(self) -> str: ...

    def tensor(self, name: str) -> npt.NDArray[Any]: ...


class ReferenceModel:
    """gpt-oss, one line of arithmetic after the other.

    dtype: float32, or float64 to see what float32's rounding costs. adapter: what it adds to the weights of
    attention, router and experts is added to their products.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        dtype: npt.DTypeLike = np.float32,
        adapter: LoraAdapter | None = None,
    ) -> None:
        self.config = checkpoint.config
        self.checkpoint = checkpoint
        self.dtype = np.dtype(dtype)
        self.adapter = adapter

    def logits(self, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Array:
        """Scores of every vocabulary entry after each token: logits_TV.

        Raises RequestError for no tokens or an id outside the vocabulary.
        """
        token_id_T = np.asarray(token_ids, dtype=np.int64)
        config = self.config
        if token_id_T.ndim != 1 or token_id_T.size == 0:
            raise RequestError(
                f"token ids have shape {token_id_T.shape}; expected at least one, in one dimension"
            )
        if token_id_T.min() < 0 or token_id_T.max() >= config.vocabulary_size:
            bad = int(token_id_T[(token_id_T < 0) | (token_id_T >= config.vocabulary_size)][0])
            raise RequestError(f"token id is {bad}; the vocabulary has ids 0 to {config.vocabulary_size - 1}")
        position_T = np.arange(token_id_T.size, dtype=np.int32)
        frequencies = inverse_frequencies(config.rope, config.head_size)
        cos_TK2, sin_TK2 = rope_tables(position_T, frequencies, attention_factor(config.rope))

        hidden_TD = self.bf16(self.checkpoint.tensor("embedding.weight")[token_id_T])
        for layer in range(config.num_layers):
            hidden_TD = hidden_TD + self.attention(layer, hidden_TD, cos_TK2, sin_TK2)
            hidden_TD = hidden_TD + self.experts(layer, hidden_TD)
        return self.linear(self.rms_norm(hidden_TD, "norm.weight"), "unembedding.weight")

    def attention(self, layer: int, hidden_TD: Array, cos_TK2: Array, sin_TK2: Array) -> Array:
        """Grouped queries, a sink a head; in a window layer a token sees `window` positions, its own too."""
        config, name, T = self.config, f"layers.{layer}.attention", hidden_TD.shape[0]
        G, R, K = config.num_kv_heads, config.group_size, config.head_size
        normed_TD = self.rms_norm(hidden_TD, f"layers.{layer}.attention_norm.weight")
        # Query head h reads key/value head h // R: the query's axes are (G, R), in that order.
        query_TGRK = self.linear(normed_TD, f"{name}.q.weight", f"{name}.q.bias").reshape(T, G, R, K)
        key_TGK = self.linear(normed_TD, f"{name}.k.weight", f"{name}.k.bias").reshape(T, G, K)
        value_TGK = self.linear(normed_TD, f"{name}.v.weight", f"{name}.v.bias").reshape(T, G, K)
        query_TGRK = rotate(query_TGRK, cos_TK2[:, None, None], sin_TK2[:, None, None])
        key_TGK, value_TGK = self.cached(rotate(key_TGK, cos_TK2[:, None], sin_TK2[:, None]), value_TGK)
        sink_GR = self.bf16(self.checkpoint.tensor(f"{name}.sinks")).reshape(G, R)
        window = config.window if config.layer_kinds[layer] == "window" else T
        mixed_TGRK = np.empty_like(query_TGRK)
        for start in range(0, T, QUERY_TILE):
            rows = slice(start, min(start + QUERY_TILE, T))
            seen = slice(max(0, start - window + 1), rows.stop)
            distance_QS = np.arange(rows.start, rows.stop)[:, None] - np.arange(seen.start, seen.stop)
            visible_QS = (distance_QS >= 0) & (distance_QS < window)
            for g in range(G):
                # One product of [Q R, K] with [K, S]: a stack of small ones takes several times as long.
                query_QRK = query_TGRK[rows, g] * K**-0.5
                score_QRS = np.tensordot(query_QRK, key_TGK[seen, g], axes=(2, 1))
                score_QRS[~np.broadcast_to(visible_QS[:, None], score_QRS.shape)] = -np.inf
                # The sink is one more column of scores that takes its share of the softmax and has no value.
                top_QR = np.maximum(score_QRS.max(axis=-1), sink_GR[g])
                weight_QRS = np.exp(score_QRS - top_QR[..., None])
                total_QR = weight_QRS.sum(axis=-1) + np.exp(sink_GR[g] - top_QR)
                mixed_QRK = np.tensordot(weight_QRS, value_TGK[seen, g], axes=(2, 0))
                mixed_TGRK[rows, g] = mixed_QRK / total_QR[..., None]
        return self.linear(mixed_TGRK.reshape(T, G * R * K), f"{name}.out.weight", f"{name}.out.bias")

    def experts(self, layer: int, hidden_TD: Array) -> Array:
        """The A experts that the router likes best, weighted by a softmax over those A."""
        config, name = self.config, f"layers.{layer}.experts"
        normed_TD = self.rms_norm(hidden_TD, f"layers.{layer}.mlp_norm.weight")
        expert_id_TA, expert_weight_TA = self.router(layer, normed_TD)
        gate_up_bias_EF2 = self.bf16(self.checkpoint.tensor(f"{name}.gate_up.bias"))
        down_bias_ED = self.bf16(self.checkpoint.tensor(f"{name}.down.bias"))
        out_TD = np.zeros_like(hidden_TD)
        for expert in np.unique(expert_id_TA):
            token_X, choice_X = np.nonzero(expert_id_TA == expert)
            gate_up_XF2 = self.product(normed_TD[token_X], self.expert_weight(f"{name}.gate_up", expert))
            gate_up_XF2 = self.adapted(f"{name}.gate_up", normed_TD[token_X], gate_up_XF2, expert)
            gate_up_XF2 += gate_up_bias_EF2[expert]
            unit_XF = swiglu(gate_up_XF2, config.swiglu_limit, config.swiglu_alpha)
            down_XD = self.product(unit_XF, self.expert_weight(f"{name}.down", expert))
            down_XD = self.adapted(f"{name}.down", unit_XF, down_XD, expert) + down_bias_ED[expert]
            out_TD[token_X] += down_XD * expert_weight_TA[token_X, choice_X, None]
        return out_TD

    def router(self, layer: int, normed_TD: Array) -> tuple[npt.NDArray[np.int64], Array]:
        """(expert ids, their weights), both [T, A], best first; of equal scores the lower id comes first."""
        name = f"layers.{layer}.router"
        score_TE = normed_TD @ self.bf16(self.checkpoint.tensor(f"{name}.weight")).T
        score_TE = self.adapted(name, normed_TD, score_TE)
        score_TE = score_TE + self.bf16(self.checkpoint.tensor(f"{name}.bias"))
        expert_id_TA = np.argsort(-score_TE, axis=-1, kind="stable")[:, : self.config.num_active_experts]
        chosen_TA = np.take_along_axis(score_TE, expert_id_TA, axis=-1)
        weight_TA = np.exp(chosen_TA - chosen_TA[:, :1])
        return expert_id_TA, weight_TA / weight_TA.sum(axis=-1, keepdims=True)

    def rms_norm(self, x_TD: Array, name: str) -> Array:
        mean_square_T1 = np.mean(np.square(x_TD), axis=-1, keepdims=True)
        # A Python float takes the array's type: the sum stays in self.dtype.
        root_T1 = np.sqrt(mean_square_T1 + self.config.rms_norm_eps)
        return np.asarray(self.bf16(self.checkpoint.tensor(name)) * (x_TD / root_T1))

    def linear(self, x_TK: Array, weight_name: str, bias_name: str | None = None) -> Array:
        out_TN = self.product(x_TK, self.bf16(self.checkpoint.tensor(weight_name)))
        out_TN = self.adapted(weight_name.removesuffix(".weight"), x_TK, out_TN)
        return out_TN if bias_name is None else out_TN + self.bf16(self.checkpoint.tensor(bias_name))

    def product(self, x_TK: Array, weight_NK: Array) -> Array:
        """x @ weight.T. Tests override it to see what rounded activations do to the logits."""
        return np.asarray(x_TK @ weight_NK.T)

    def adapted(self, name: str, x_TK: Array, product_TN: Array, expert: int | None = None) -> Array:
        """The product with what the adapter adds to it, if it adds anything."""
        if self.adapter is None or not name.startswith("layers."):
            return product_TN
        _, layer, target = name.split(".", 2)
        pair = self.adapter.layers[int(layer)].get(target)
        if pair is None:
            return product_TN
        delta_NK = pair.delta(expert).astype(self.dtype)
        return np.asarray(product_TN + x_TK @ delta_NK.T)

    def cached(self, key_TGK: Array, value_TGK: Array) -> tuple[Array, Array]:
        """What attention reads back: here the numbers themselves; a runner's cache rounds them to bf16."""
        return key_TGK, value_TGK

    def expert_weight(self, name: str, expert: int) -> Array:
        """One expert's matrix as [outputs, inputs]."""
        if self.checkpoint.expert_format == "bf16":
            # Hugging Face lays plain experts out as [inputs, outputs].
            return np.asarray(self.bf16(self.checkpoint.tensor(f"{name}.weight")[expert]).T)
        blocks, scales = self.checkpoint.tensor(f"{name}.blocks"), self.checkpoint.tensor(f"{name}.scales")
        return np.asarray(decode_mxfp4(blocks[expert], scales[expert]), dtype=self.dtype)

    def bf16(self, bits: npt.NDArray[np.uint16]) -> Array:
        return np.asarray(decode_bfloat16(bits), dtype=self.dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + K/2]): the halves of a head, not its neighbors."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def swiglu(gate_up_XF2: Array, limit: float, alpha: float) -> Array:
    """Clamped SwiGLU. Gate and up alternate; the gate is clamped above only, and up has one added to it."""
    gate_XF = np.minimum(gate_up_XF2[..., 0::2], limit)
    up_XF = np.clip(gate_up_XF2[..., 1::2], -limit, limit)
    # exp may overflow to inf, and gate / inf is the 0 that the sigmoid tends to.
    with np.errstate(over="ignore"):
        return np.asarray(gate_XF / (1 + np.exp(-alpha * gate_XF)) * (up_XF + 1))
