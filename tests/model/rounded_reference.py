"""The reference with a runner's roundings put in, to tell what they explain from what would be a fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.bfloat16 import decode_bfloat16, encode_bfloat16
from harmonium.checkpoint.names import UNEMBEDDING
from harmonium.kernels.reference_matmul import quantize_activations, quantize_weight
from harmonium.kernels.reference_ops import float32_from_int8, quantize_heads
from harmonium.model.reference import Array, ReferenceModel


def to_bf16(x: Array) -> Array:
    return decode_bfloat16(encode_bfloat16(np.asarray(x, dtype=np.float32)))


def from_int8(quantized: tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]) -> Array:
    q, scale = quantized
    return np.asarray(q * np.repeat(scale, 32, axis=-1), dtype=np.float32)


class Bf16Reference(ReferenceModel):
    """Activations enter products, and keys and values the cache, as bf16."""

    def product(self, x_TK: Array, weight_NK: Array) -> Array:
        return super().product(to_bf16(x_TK), weight_NK)

    def cached(self, key_TGK: Array, value_TGK: Array) -> tuple[Array, Array]:
        return to_bf16(key_TGK), to_bf16(value_TGK)


class Int8Reference(ReferenceModel):
    """Activations and dense weights as int8 with a scale per 32; keys and values as bf16."""

    def product(self, x_TK: Array, weight_NK: Array) -> Array:
        return super().product(from_int8(quantize_activations(np.asarray(x_TK, np.float32))), weight_NK)

    def linear(self, x_TK: Array, weight_name: str, bias_name: str | None = None) -> Array:
        most = 119 if weight_name == UNEMBEDDING else 127
        out_TN = self.product(x_TK, from_int8(quantize_weight(self.checkpoint.tensor(weight_name), most)))
        out_TN = self.adapted(weight_name.removesuffix(".weight"), x_TK, out_TN)
        return out_TN if bias_name is None else out_TN + self.bf16(self.checkpoint.tensor(bias_name))

    def cached(self, key_TGK: Array, value_TGK: Array) -> tuple[Array, Array]:
        return to_bf16(key_TGK), to_bf16(value_TGK)


class Int8CacheReference(Bf16Reference):
    """As Bf16Reference, with keys and values as int8 and a bf16 scale per 32."""

    def cached(self, key_TGK: Array, value_TGK: Array) -> tuple[Array, Array]:
        key, value = (
            float32_from_int8(*quantize_heads(np.asarray(x, np.float32))) for x in (key_TGK, value_TGK)
        )
        return key, value


def row_errors(logits: npt.NDArray[Any], expected: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Root mean square difference at each position, over the root mean square of all expected logits."""
    scale = np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
    return np.asarray(np.sqrt(np.mean(np.square(logits - expected, dtype=np.float64), axis=1)) / scale)


def typical_error(logits: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The median of row_errors. Where two experts' scores nearly tie, a rounding chooses another expert
    and moves that position's logits by a tenth and more; a mean would measure the number of near ties.
    """
    return float(np.median(row_errors(logits, expected)))
