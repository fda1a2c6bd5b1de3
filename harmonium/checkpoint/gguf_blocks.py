"""ggml's blocks in NumPy: the specification of native/gguf.h, and what encodes them for tests.

MXFP4: a byte of scale (e8m0), then 16 bytes; byte j holds number j (low nibble) and j + 16 (high), where the
checkpoints of Hugging Face and OpenAI have 2j and 2j + 1. Q8_0: a float16 of scale, then 32 int8.

Source: ggml-org/ggml:src/ggml-common.h, ggml-quants.c (dequantize_row_mxfp4, quantize_row_q8_0_ref).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.bfloat16 import encode_bfloat16

U8 = npt.NDArray[np.uint8]

MXFP4_BYTES = 17
Q8_BYTES = 34


def split_mxfp4(rows: U8, is_split: bool) -> tuple[U8, U8]:
    """ggml's rows [..., 17 n] -> our blocks [..., n, 16] and scales [..., n], copies.

    is_split: the order of the nibbles is ggml's; otherwise ours already.
    """
    records = rows.reshape(*rows.shape[:-1], -1, MXFP4_BYTES)
    scales = np.ascontiguousarray(records[..., 0])
    blocks = records[..., 1:]
    if not is_split:
        return np.ascontiguousarray(blocks), scales
    numbers = np.concatenate((blocks & 0x0F, blocks >> 4), axis=-1)
    return numbers[..., 0::2] | numbers[..., 1::2] << np.uint8(4), scales


def join_mxfp4(blocks: U8, scales: U8, is_split: bool = True) -> U8:
    """The inverse of `split_mxfp4`."""
    if is_split:
        numbers = np.stack((blocks & 0x0F, blocks >> 4), axis=-1).reshape(*blocks.shape[:-1], 32)
        blocks = numbers[..., :16] | numbers[..., 16:] << np.uint8(4)
    rows = np.concatenate((scales[..., None], blocks), axis=-1)
    return rows.reshape(*rows.shape[:-2], -1)


def decode_q8(rows: U8) -> npt.NDArray[np.float32]:
    """Q8_0 rows [..., 34 n] -> float32 [..., 32 n]."""
    records = np.ascontiguousarray(rows.reshape(*rows.shape[:-1], -1, Q8_BYTES))
    scales = np.ascontiguousarray(records[..., :2]).view("<f2").astype(np.float32)
    values: npt.NDArray[np.float32] = np.ascontiguousarray(records[..., 2:]).view(np.int8) * scales
    return values.reshape(*rows.shape[:-1], -1)


def encode_q8(values: npt.NDArray[np.float32]) -> U8:
    """float32 [..., 32 n] -> Q8_0 rows [..., 34 n]: the largest of 32 becomes 127, halves away from zero."""
    grouped = values.reshape(*values.shape[:-1], -1, 32)
    scale = np.abs(grouped).max(axis=-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    scaled = grouped * inverse
    numbers = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    rows = np.concatenate((scale.astype("<f2").view(np.uint8), numbers.view(np.uint8)), axis=-1)
    return rows.reshape(*values.shape[:-1], -1)


def to_bfloat16(rows: U8, type_name: str) -> npt.NDArray[np.uint16]:
    """Rows of BF16 (a view), F16, F32 or Q8_0 as bf16 bits, to nearest even."""
    if type_name == "BF16":
        return rows.view("<u2")
    if type_name == "Q8_0":
        return encode_bfloat16(decode_q8(rows))
    return encode_bfloat16(rows.view("<f4" if type_name == "F32" else "<f2").astype(np.float32))
