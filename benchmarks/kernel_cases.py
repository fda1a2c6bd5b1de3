"""One call of every native kernel on a small fixed shape: what benchmarks/instructions.py counts.

Sizes are odd on purpose where a kernel has tails. Inputs are random with fixed seeds: most kernels execute
the same instructions whatever the numbers are, and those that do not (router, sampling) get the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.kernels import gguf, matmul, ops, sampling, streamed, unembedding

Case = tuple[str, Callable[[], object]]

WIDTH = 480  # D and F of the experts: whole groups of 128 and one of 96
NUM_EXPERTS, NUM_ACTIVE = 4, 2
LIMIT, ALPHA = 7.0, 1.702
VOCABULARY = 20_001


def floats(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits(seed: int, *shape: int) -> npt.NDArray[np.uint16]:
    """Small numbers in bf16."""
    return ((floats(seed, *shape) * 0.1).view(np.uint32) >> 16).astype(np.uint16)


def blocks(seed: int, *shape: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """MXFP4 blocks of a matrix [..., N, K], and their scales."""
    rng = np.random.default_rng(seed)
    shape = (*shape[:-1], shape[-1] // 32)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(116, 121, shape, np.uint8)


def dense_cases() -> Iterator[Case]:
    weight_bits = bits(1, 200, WIDTH)
    weight, bias = matmul.quantize_weight(weight_bits), bits(2, 200)
    mxfp4 = blocks(3, 200, WIDTH)
    yield "quantize_weight 200x480", lambda: matmul.quantize_weight(weight_bits)
    for count in (1, 7, 33):
        x, out = floats(4, count, WIDTH), np.empty((count, 200), np.float32)
        yield f"linear_int8 {count}x480", _bind(matmul.linear_int8, x, weight, bias, out)
        yield f"linear_bf16 {count}x480", _bind(matmul.linear_bf16, x, weight_bits, bias, out)
        yield f"matmul_mxfp4 {count}x480", _bind(matmul.matmul_mxfp4, x, *mxfp4, bias, out)
    split = unembedding.quantize_unembedding(weight_bits)
    yield "quantize_unembedding 200x480", lambda: unembedding.quantize_unembedding(weight_bits)
    for count in (1, 7):
        x, out = floats(4, count, WIDTH), np.empty((count, 200), np.float32)
        yield f"logits {count}x480", _bind(unembedding.logits, x, split, out)
    x, out = floats(4, 2, WIDTH), np.empty((2, 200), np.float32)
    wishes = [unembedding.Wish(1)] * 2
    yield "screened_logits 2x480", _bind(unembedding.screened_logits, x, split, wishes, out)
    draws = [unembedding.Wish(key=key, temperature=1.0) for key in (3, 4)]
    yield "screened_logits 2x480, draws", _bind(unembedding.screened_logits, x, split, draws, out)
    x, out = floats(5, 17, WIDTH), np.zeros((17, 200), np.float32)
    rows, a, b = np.arange(17, dtype=np.int32), floats(6, 8, WIDTH), floats(7, 8, 200)
    yield "low_rank 17x480, rank 8", _bind(matmul.low_rank, x, rows, a, b, 0.5, out)


def expert_cases() -> Iterator[Case]:
    up, down = blocks(11, NUM_EXPERTS, 2 * WIDTH, WIDTH), blocks(12, NUM_EXPERTS, WIDTH, WIDTH)
    up_bias, down_bias = bits(13, NUM_EXPERTS, 2 * WIDTH), bits(14, NUM_EXPERTS, WIDTH)
    packed = [_packed(*up), _packed(*down)]
    yield "pack_mxfp4 480x480", _bind(matmul.pack_mxfp4, down[0][0], down[1][0], packed[1][0].copy())
    for count in (1, 12):
        x, out = floats(15, count, WIDTH), np.zeros((count, WIDTH), np.float32)
        ids = (np.arange(count * NUM_ACTIVE, dtype=np.int32) % NUM_EXPERTS).reshape(count, NUM_ACTIVE)
        start = (x, ids, np.full(ids.shape, 0.25, np.float32))
        end = (out, LIMIT, ALPHA)
        name = f"{count} tokens, 2 of 4 experts"
        experts = (*up, up_bias, *down, down_bias)
        yield f"moe_mxfp4 int8, {name}", _bind(matmul.moe_mxfp4, *start, *experts, *end)
        yield f"moe_mxfp4 bf16, {name}", _bind(matmul.moe_mxfp4, *start, *experts, *end, "bf16")
        yield (
            f"moe_packed, {name}",
            _bind(matmul.moe_packed, *start, packed[0], up_bias, packed[1], down_bias, *end),
        )
    plain = (bits(16, NUM_EXPERTS, WIDTH, 2 * WIDTH), up_bias, bits(17, NUM_EXPERTS, WIDTH, WIDTH), down_bias)
    yield f"moe_bf16, {name}", _bind(matmul.moe_bf16, *start, *plain, *end)
    ggml = [
        np.concatenate([scales[..., None], data], -1).reshape(*data.shape[:2], -1)
        for data, scales in (up, down)
    ]
    yield (
        f"moe_ggml, {name}",
        _bind(gguf.moe_ggml, *start, ggml[0], None, True, up_bias, ggml[1], down_bias, *end),
    )
    parts = floats(18, count, NUM_ACTIVE, WIDTH)
    yield "add_moe_parts 12x2x480", _bind(streamed.add_moe_parts, parts, out)


def _packed(data: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The experts' matrices in tiles."""
    out = np.empty((len(data), *matmul.packed_shape(data.shape[1], data.shape[2] * 32)), np.uint8)
    for expert in range(len(data)):
        matmul.pack_mxfp4(data[expert], scales[expert], out[expert])
    return out


def other_cases() -> Iterator[Case]:
    x, out = floats(21, 65, WIDTH), np.empty((65, WIDTH), np.float32)
    yield "rms_norm 65x480", _bind(ops.rms_norm, x, floats(22, WIDTH), 1e-5, out)
    ids, weights = np.empty((65, 4), np.int32), np.empty((65, 4), np.float32)
    yield "router 65x480, 4 of 32", _bind(ops.router, x, bits(23, 32, WIDTH), floats(24, 32), ids, weights)
    tokens = np.arange(65, dtype=np.int32)
    yield "gather_rows 65x480", _bind(ops.gather_rows, bits(25, 65, WIDTH), tokens, out)
    yield from attention_cases()
    logits = floats(26, 1, VOCABULARY) * 3
    for name, settings in (
        ("greedy", sampling.DrawSettings(3, 0.0)),
        ("temperature", sampling.DrawSettings(3, 1.0, num_top=5)),
        ("top-k, top-p", sampling.DrawSettings(3, 0.8, top_k=40, top_p=0.9)),
    ):
        yield f"sample {name}, 20,001 logits", _bind(sampling.sample, logits, [(0, settings)])


def attention_cases() -> Iterator[Case]:
    """Each with a cache in bf16 and in int8."""
    heads, groups, size, block, num_blocks = 8, 2, 64, 16, 20
    shape = (num_blocks, groups, block, size)
    rng = np.random.default_rng(31)
    int8 = [rng.integers(-127, 128, shape, np.int8) for _ in "kv"]
    scales = [bits(32, *shape[:3], size // ops.SCALE_GROUP) for _ in "kv"]
    sink, angle = floats(33, heads), floats(34, 40, size // 2)
    angles, slots = (np.cos(angle), np.sin(angle)), np.arange(40, dtype=np.int64)
    for kind, cache, extra in (("bf16", [bits(31, *shape) for _ in "kv"], []), ("int8", int8, scales)):
        for name, count, context, window in (
            ("decode, 300 before", 1, 300, 0),
            ("decode, window 128", 1, 300, 128),
            ("prefill of 40, 200 before", 40, 240, 0),
        ):
            qkv = floats(35, count, (heads + 2 * groups) * size)
            table = np.arange(num_blocks, dtype=np.int32)[None]
            starts, lengths = np.array([0, count], np.int32), np.array([context], np.int32)
            out = np.empty((count, heads * size), np.float32)
            arrays = (qkv, *cache, table, starts, lengths, sink)
            yield f"attention {kind}, {name}", _bind(ops.attention, *arrays, window, 0.125, out, *extra)
        stored = (qkv, *angles, *cache, slots, heads, *extra)
        yield f"rope_and_store {kind}, 40x12x64", _bind(ops.rope_and_store, *stored)


def _bind(kernel: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    return lambda: kernel(*arguments)


def all_cases() -> Iterator[Case]:
    yield from dense_cases()
    yield from expert_cases()
    yield from other_cases()
