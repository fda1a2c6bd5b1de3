"""Specification of the kernels in kernels/matmul.py, in NumPy. Signatures and shapes are those of that file.

Quantization is in float32, as the kernels must do it to the bit; products and sums are float64 and rounded to
float32 once, so that a kernel's distance from here is its own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "E2M1_VALUES",
    "decode_mxfp4",
    "linear_bf16",
    "linear_int8",
    "low_rank",
    "matmul_mxfp4",
    "moe_bf16",
    "moe_mxfp4",
    "moe_packed",
    "pack_mxfp4",
    "quantize_activations",
    "quantize_weight",
    "swiglu",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bf16 = npt.NDArray[np.uint16]
U8 = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Activations = Literal["int8", "bf16"]
Pair = tuple[npt.NDArray[Any], npt.NDArray[Any], float]
ExpertAdapter = tuple[Pair | None, Pair | None]

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The sixteen values of MXFP4's elements. Source: OCP Microscaling Formats (MX) 1.0, table 5."""

_BLOCK = 32
_TILE_ROWS = 32
_LEAST_NORMAL = np.finfo(np.float32).tiny


def _from_bf16(bits: Bf16) -> F32:
    wide = bits.astype(np.uint32) << np.uint32(16)
    return np.asarray(wide, np.uint32).view(np.float32)


def _round_to_bf16(x: F32) -> F32:
    """To the nearest bf16 number, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def decode_mxfp4(blocks: U8, scales: U8) -> F32:
    """Return [..., K] float32 for blocks [..., K/32, 16] and scales [..., K/32].

    Byte j of a block holds element 2j in its low and 2j + 1 in its high half. A scale byte e means
    2^(e - 127); 255 is NaN. Source: OCP Microscaling Formats (MX) 1.0, sections 5.3 and 5.4; the order of the
    halves is the released checkpoints' (openai/gpt-oss:gpt_oss/torch/weights.py).
    """
    value = np.stack([E2M1_VALUES[blocks & 15], E2M1_VALUES[blocks >> 4]], axis=-1)
    scale = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)
    scale[scales == 255] = np.nan
    product: F32 = value.reshape(*blocks.shape[:-1], _BLOCK) * scale[..., None]
    return product.reshape(*blocks.shape[:-2], -1)


def quantize_activations(x_TK: F32) -> tuple[Int8, F32]:
    """Return q [T, K] int8 and scale [T, K/32] float32: x is about q * scale.

    scale is the block's largest magnitude / 127. A block too small for a normal float32 scale becomes zero;
    one with NaN or infinity gets q 0 and scale NaN, so that what it touches is NaN.
    """
    block = x_TK.reshape(*x_TK.shape[:-1], -1, _BLOCK)
    most = np.abs(block).max(axis=-1)
    is_finite = np.isfinite(block).all(axis=-1)
    scale = np.where(is_finite, most, np.float32(0)).astype(np.float32) / np.float32(127)
    is_used = np.logical_and(is_finite, scale >= _LEAST_NORMAL)
    inverse = np.float32(1) / np.where(is_used, scale, np.float32(1))
    q = np.rint(np.where(np.expand_dims(is_used, -1), block, np.float32(0)) * inverse[..., None]).astype(
        np.int8
    )
    scale = np.where(is_used, scale, np.where(is_finite, np.float32(0), np.float32(np.nan))).astype(
        np.float32
    )
    return q.reshape(x_TK.shape), scale


def quantize_weight(weight_NK: Bf16, most: int = 127) -> tuple[Int8, F32]:
    """Return q [N, K] int8 in -most..most and scale [N, K/32] float32 that bf16 holds exactly.

    most: 119 for the unembedding, whose bytes have room for dither. scale is the block's largest magnitude
    / most rounded up to bf16; NaN where the block is not finite (q 0).
    """
    block = _from_bf16(weight_NK).reshape(weight_NK.shape[0], -1, _BLOCK)
    is_finite = np.isfinite(block).all(axis=-1)
    finite = np.where(np.expand_dims(is_finite, -1), block, np.float32(0))
    exact = np.abs(finite).max(axis=-1) / np.float32(most)
    bits = np.ascontiguousarray(exact).view(np.uint32)
    scale = ((bits + np.uint32(0xFFFF)) >> np.uint32(16) << np.uint32(16)).view(np.float32)
    q = np.rint(finite / np.where(scale > 0, scale, np.float32(1))[..., None]).astype(np.int8)
    return q.reshape(weight_NK.shape), np.where(is_finite, scale, np.float32(np.nan))


def _dequantize(q: Int8, scale: F32) -> F64:
    return q.astype(np.float64) * np.repeat(scale.astype(np.float64), _BLOCK, axis=-1)


def _activations(x_TK: F32, activations: Activations) -> F64:
    """What a product sees of x."""
    if activations == "bf16":
        return _round_to_bf16(x_TK).astype(np.float64)
    return _dequantize(*quantize_activations(x_TK))


def _write(product_TN: F64, bias_N: Bf16 | None, out_TN: F32, add: bool) -> None:
    total = product_TN if bias_N is None else product_TN + _from_bf16(bias_N)
    out_TN[:] = out_TN + total if add else total


def linear_int8(x_TK: F32, weight_NK: Bf16, bias_N: Bf16 | None, out_TN: F32, add: bool = False) -> None:
    """Write x @ weight.T + bias to out (or add it), both factors quantized to int8 per 32 inputs."""
    weight = _dequantize(*quantize_weight(weight_NK))
    _write(_activations(x_TK, "int8") @ weight.T, bias_N, out_TN, add)


def linear_bf16(x_TK: F32, weight_NK: Bf16, bias_N: Bf16 | None, out_TN: F32, add: bool = False) -> None:
    """Write x @ weight.T + bias to out (or add it), x rounded to bf16."""
    _write(_activations(x_TK, "bf16") @ _from_bf16(weight_NK).astype(np.float64).T, bias_N, out_TN, add)


def matmul_mxfp4(
    x_TK: F32,
    blocks_NK: U8,
    scales_NB: U8,
    bias_N: Bf16 | None,
    out_TN: F32,
    activations: Activations = "int8",
) -> None:
    """Write x @ weight.T + bias to out for one MXFP4 matrix, whose values are taken exactly."""
    weight = decode_mxfp4(blocks_NK, scales_NB).astype(np.float64)
    _write(_activations(x_TK, activations) @ weight.T, bias_N, out_TN, False)


def _low_rank(x_K: F64, a_RK: npt.NDArray[Any], b_RN: npt.NDArray[Any], scale: float) -> F64:
    a, b = (_from_bf16(w) if w.dtype == np.uint16 else w for w in (a_RK, b_RN))
    # A kernel keeps the scale in float32.
    return np.asarray((a.astype(np.float64) @ x_K) * np.float64(np.float32(scale)) @ b.astype(np.float64))


def low_rank(
    x_TK: F32,
    row_X: Int32,
    a_RK: npt.NDArray[Any],
    b_RN: npt.NDArray[Any],
    scale: float,
    out_TM: F32,
    column: int = 0,
) -> None:
    """Add scale * (x @ a.T) @ b to a run of columns of out, for some rows of x and out."""
    for row in row_X:
        columns = slice(column, column + b_RN.shape[1])
        product_N = _low_rank(x_TK[row].astype(np.float64), a_RK, b_RN, scale)
        out_TM[row, columns] = out_TM[row, columns] + product_N


def swiglu(gate_up: F64, limit: float, alpha: float) -> F64:
    """Return [..., F] for [..., 2F]: gate * sigmoid(alpha * gate) * (up + 1), clamped first.

    Even places are gates (at most limit), odd ones ups (between -limit and limit).
    Source: openai/gpt-oss:gpt_oss/torch/model.py.
    """
    gate = np.minimum(gate_up[..., 0::2], limit)
    up = np.clip(gate_up[..., 1::2], -limit, limit)
    with np.errstate(over="ignore"):  # e^x may overflow: the quotient is then zero, as it should be
        return np.asarray(gate / (1 + np.exp(-alpha * gate)) * (up + 1))


def _moe(
    x_TD: F32,
    expert_id_TA: Int32,
    expert_weight_TA: F32,
    gate_up_ENK: F32,
    gate_up_bias: Bf16,
    down_ENK: F32,
    down_bias: Bf16,
    out_TD: F32,
    limit: float,
    alpha: float,
    activations: Activations,
    adapters: Sequence[ExpertAdapter] | None,
    adapter_T: Int32 | None,
) -> None:
    x = _activations(x_TD, activations)
    for token, experts in enumerate(expert_id_TA):
        total = np.zeros(out_TD.shape[1])
        has_adapter = adapters is not None and adapter_T is not None and adapter_T[token] >= 0
        up, low = adapters[adapter_T[token]] if has_adapter else (None, None)  # type: ignore[index]
        for slot, expert in enumerate(experts):
            gate_up = gate_up_ENK[expert].astype(np.float64) @ x[token] + _from_bf16(gate_up_bias[expert])
            if up is not None:
                gate_up += _low_rank(x_TD[token].astype(np.float64), up[0][expert], up[1][expert], up[2])
            unit_F = swiglu(gate_up, limit, alpha).astype(np.float32)
            down = down_ENK[expert].astype(np.float64) @ _activations(unit_F[None], activations)[0]
            if low is not None:
                down += _low_rank(unit_F.astype(np.float64), low[0][expert], low[1][expert], low[2])
            total += (down + _from_bf16(down_bias[expert])) * expert_weight_TA[token, slot]
        out_TD[token] = out_TD[token] + total


def moe_mxfp4(
    x_TD: F32,
    expert_id_TA: Int32,
    expert_weight_TA: F32,
    gate_up_blocks: U8,
    gate_up_scales: U8,
    gate_up_bias: Bf16,
    down_blocks: U8,
    down_scales: U8,
    down_bias: Bf16,
    out_TD: F32,
    limit: float,
    alpha: float,
    activations: Activations = "int8",
    adapters: Sequence[ExpertAdapter] | None = None,
    adapter_T: Int32 | None = None,
) -> None:
    """Add to out, for each token, its experts' outputs times their weights.

    The units between the two products enter the second as the inputs enter the first: quantized or rounded.
    What an adapter adds is computed from both as they are.
    """
    gate_up, down = decode_mxfp4(gate_up_blocks, gate_up_scales), decode_mxfp4(down_blocks, down_scales)
    routes = x_TD, expert_id_TA, expert_weight_TA
    _moe(
        *routes,
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        out_TD,
        limit,
        alpha,
        activations,
        adapters,
        adapter_T,
    )


def pack_mxfp4(blocks_NK: U8, scales_NB: U8, packed: U8) -> None:
    """Write blocks [N, B, 16] and scales [N, B] to tiles [ceil(N/32), bytes] (docs/kernels.md).

    A tile: for each two blocks their scales [2, 32 rows], then their [2, 2 panels, 4, 16 rows, 4] bytes.
    """
    N, B, _ = blocks_NK.shape
    tiles, pairs = packed.shape[0], -(-B // 2)
    blocks = np.zeros((tiles * _TILE_ROWS, pairs * 2, 16), np.uint8)
    scales = np.zeros((tiles * _TILE_ROWS, pairs * 2), np.uint8)
    blocks[:N, :B], scales[:N, :B] = blocks_NK, scales_NB
    to = packed.reshape(tiles, pairs, -1)
    to[:, :, : 2 * _TILE_ROWS] = (
        scales.reshape(tiles, _TILE_ROWS, -1).swapaxes(1, 2).reshape(tiles, pairs, -1)
    )
    parts = blocks.reshape(tiles, 2, 16, pairs * 2, 4, 4).transpose(0, 3, 1, 4, 2, 5)
    to[:, :, 2 * _TILE_ROWS :] = parts.reshape(tiles, pairs, -1)


def _unpack(packed: U8, num_outputs: int, num_inputs: int) -> tuple[U8, U8]:
    """What `pack_mxfp4` took for each of E matrices: blocks [E, N, B, 16] and scales [E, N, B]."""
    E, tiles, _ = packed.shape
    B = num_inputs // _BLOCK
    pairs = packed.reshape(E, tiles, -(-B // 2), -1)
    scales = pairs[..., : 2 * _TILE_ROWS].reshape(E, tiles, -1, _TILE_ROWS).swapaxes(2, 3)
    parts = pairs[..., 2 * _TILE_ROWS :].reshape(E, tiles, -1, 2, 4, 16, 4)
    blocks = parts.transpose(0, 1, 3, 5, 2, 4, 6).reshape(E, tiles * _TILE_ROWS, -1, 16)
    return blocks[:, :num_outputs, :B], scales.reshape(E, tiles * _TILE_ROWS, -1)[:, :num_outputs, :B]


def moe_packed(
    x_TD: F32,
    expert_id_TA: Int32,
    expert_weight_TA: F32,
    gate_up_packed: U8,
    gate_up_bias: Bf16,
    down_packed: U8,
    down_bias: Bf16,
    out_TD: F32,
    limit: float,
    alpha: float,
    adapters: Sequence[ExpertAdapter] | None = None,
    adapter_T: Int32 | None = None,
) -> None:
    """Add to out what moe_mxfp4 adds with int8 activations, from packed tiles."""
    hidden, units = down_bias.shape[1], gate_up_bias.shape[1]
    gate_up = decode_mxfp4(*_unpack(gate_up_packed, units, hidden))
    down = decode_mxfp4(*_unpack(down_packed, hidden, units // 2))
    routes = x_TD, expert_id_TA, expert_weight_TA
    _moe(*routes, gate_up, gate_up_bias, down, down_bias, out_TD, limit, alpha, "int8", adapters, adapter_T)


def moe_bf16(
    x_TD: F32,
    expert_id_TA: Int32,
    expert_weight_TA: F32,
    gate_up_weight: Bf16,
    gate_up_bias: Bf16,
    down_weight: Bf16,
    down_bias: Bf16,
    out_TD: F32,
    limit: float,
    alpha: float,
    adapters: Sequence[ExpertAdapter] | None = None,
    adapter_T: Int32 | None = None,
) -> None:
    """Add to out what moe_mxfp4 adds, for bf16 experts [E, D, 2F] and [E, F, D]."""
    gate_up, down = _from_bf16(gate_up_weight).swapaxes(1, 2), _from_bf16(down_weight).swapaxes(1, 2)
    routes = x_TD, expert_id_TA, expert_weight_TA
    _moe(*routes, gate_up, gate_up_bias, down, down_bias, out_TD, limit, alpha, "bf16", adapters, adapter_T)
