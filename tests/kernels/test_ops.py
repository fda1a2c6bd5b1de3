"""The kernels of kernels/ops.py, on every instruction set of this machine, against their specification.

Attention has its own file, test_attention.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.kernels import ops, reference_ops

Floats = npt.NDArray[np.float32]


def normal(seed: int, *shape: int, spread: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def bf16(x: Floats) -> npt.NDArray[np.uint16]:
    return reference_ops.round_to_bf16(x)


# ---- norm, embedding, router


@pytest.mark.parametrize("width", [1, 7, 15, 16, 17, 63, 96, 131, 2880])
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_rms_norm_is_the_specification(isa: str, width: int, num_tokens: int) -> None:
    x, weight = normal(1, num_tokens, width, spread=3), normal(2, width)
    out, expected = np.full_like(x, np.nan), np.empty_like(x)
    ops.rms_norm(x, weight, 1e-5, out)
    reference_ops.rms_norm(x, weight, 1e-5, expected)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-12)
    ops.rms_norm(x, weight, 1e-5, x)
    np.testing.assert_array_equal(x, out)


def test_rms_norm_takes_a_checkpoints_bf16_weight(isa: str) -> None:
    x, weight = normal(1, 3, 96), bf16(normal(2, 96))
    out, expected = np.empty_like(x), np.empty_like(x)
    ops.rms_norm(x, weight, 1e-5, out)
    ops.rms_norm(x, reference_ops.float32_from_bf16(weight), 1e-5, expected)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("width", [1, 8, 21, 96, 2880])
def test_gather_rows_is_the_specification(isa: str, width: int) -> None:
    table = np.random.default_rng(3).integers(0, 0x7F80, (11, width)).astype(np.uint16)
    token_id = np.array([10, 0, 3, 3, 7, 1, 2, 9, 8, 0], np.int32)
    out, expected = np.empty((10, width), np.float32), np.empty((10, width), np.float32)
    ops.gather_rows(table, token_id, out)
    reference_ops.gather_rows(table, token_id, expected)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("num_tokens", "width", "num_experts", "num_active"),
    [(1, 96, 5, 2), (1, 2880, 32, 4), (3, 131, 7, 7), (37, 96, 19, 4), (2, 33, 128, 4), (4, 5, 1, 1)],
)
def test_router_is_the_specification(
    isa: str, num_tokens: int, width: int, num_experts: int, num_active: int
) -> None:
    x, bias = normal(4, num_tokens, width), normal(6, num_experts)
    weight = bf16(normal(5, num_experts, width, spread=width**-0.5))
    results = []
    for function in (ops.router, reference_ops.router):
        expert_id = np.full((num_tokens, num_active), -1, np.int32)
        expert_weight = np.full((num_tokens, num_active), np.nan, np.float32)
        function(x, weight, bias, expert_id, expert_weight)
        results.append((expert_id, expert_weight))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_router_prefers_the_lower_id_among_equal_logits(isa: str) -> None:
    x = np.ones((1, 16), np.float32)
    weight = bf16(np.zeros((6, 16), np.float32))
    bias = np.array([0, 1, 2, 1, 2, 1], np.float32)
    expert_id, expert_weight = np.empty((1, 4), np.int32), np.empty((1, 4), np.float32)
    ops.router(x, weight, bias, expert_id, expert_weight)
    assert expert_id.tolist() == [[2, 4, 1, 3]]
    np.testing.assert_allclose(expert_weight.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("where", ["one logit", "all logits", "infinite"])
def test_router_ids_are_valid_and_different_when_logits_are_not_numbers(isa: str, where: str) -> None:
    x = normal(1, 2, 16)
    bias = np.zeros(5, np.float32)
    if where == "one logit":
        bias[2] = np.nan
    else:
        x[:] = np.nan if where == "all logits" else np.inf
    expert_id, expert_weight = np.full((2, 4), -1, np.int32), np.empty((2, 4), np.float32)
    ops.router(x, bf16(normal(2, 5, 16)), bias, expert_id, expert_weight)
    for row in expert_id.tolist():
        assert len(set(row)) == 4 and all(0 <= e < 5 for e in row)
        assert where != "one logit" or 2 not in row


def test_router_choice_does_not_depend_on_the_tokens_beside(isa: str) -> None:
    x, weight, bias = normal(1, 9, 131), bf16(normal(2, 10, 131)), normal(3, 10)
    together = np.empty((9, 3), np.int32), np.empty((9, 3), np.float32)
    ops.router(x, weight, bias, *together)
    for t in range(9):
        alone = np.empty((1, 3), np.int32), np.empty((1, 3), np.float32)
        ops.router(x[t : t + 1], weight, bias, *alone)
        np.testing.assert_array_equal(alone[0][0], together[0][t])
        np.testing.assert_array_equal(alone[1][0], together[1][t])


# ---- rotary embedding


@pytest.mark.parametrize(
    ("H", "G", "P", "K"), [(12, 4, 8, 16), (8, 8, 5, 8), (6, 2, 32, 64), (2, 1, 4, 24), (2, 1, 4, 80)]
)
def test_rope_and_store_is_the_specification_to_the_bit(isa: str, H: int, G: int, P: int, K: int) -> None:
    num_tokens, num_blocks = 13, 7
    slot = np.random.default_rng(1).permutation(num_blocks * P)[:num_tokens].astype(np.int64)
    angle = normal(2, num_tokens, K // 2, spread=5)
    qkv = normal(3, num_tokens, (H + 2 * G) * K, spread=4)
    qkv[0, -1], qkv[1, -2], qkv[2, -1] = np.nan, np.inf, 1e-41
    results = []
    for function in (ops.rope_and_store, reference_ops.rope_and_store):
        caches = np.full((2, num_blocks, G, P, K), 0x1234, np.uint16)
        rotated = qkv.copy()
        function(rotated, np.cos(angle), np.sin(angle), caches[0], caches[1], slot, H)
        results.append((rotated, caches))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("K", [8, 24, 64, 80])
def test_int8_cache_is_the_specification_to_the_bit(isa: str, K: int) -> None:
    H, G, P, num_blocks, num_tokens = 6, 3, 4, 5, 19
    slot = np.random.default_rng(1).permutation(num_blocks * P)[:num_tokens].astype(np.int64)
    angle = normal(2, num_tokens, K // 2, spread=5)
    size = np.exp(normal(4, num_tokens, 1, spread=20)).astype(np.float32)  # scales of every order
    qkv = normal(3, num_tokens, (H + 2 * G) * K) * size
    qkv[0, -1], qkv[1, -2], qkv[2, -1] = np.nan, np.inf, -np.inf
    qkv[3, -K:], qkv[4, -K:], qkv[5, -K:] = 0, 1e-41, 3.4e38
    results = []
    for function in (ops.rope_and_store, reference_ops.rope_and_store):
        caches = np.full((2, num_blocks, G, P, K), 99, np.int8)
        scales = np.full((2, num_blocks, G, P, -(-K // 32)), 0x1234, np.uint16)
        angles = np.cos(angle), np.sin(angle)
        function(qkv.copy(), *angles, caches[0], caches[1], slot, H, scales[0], scales[1])
        results.append((caches, scales))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_int8_specification_is_off_by_half_a_step_and_keeps_what_is_no_number() -> None:
    x = normal(1, 50, 80, spread=3)
    x[3, 40], x[4, 0], x[5, 79], x[6, :32] = np.nan, np.inf, -np.inf, 0
    q, scale = reference_ops.quantize_heads(x)
    back = reference_ops.float32_from_int8(q, scale)
    assert np.isnan(back[3, 32:64]).all() and np.isnan(back[4, :32]).all() and np.isnan(back[5, 64:]).all()
    assert (back[6, :32] == 0).all()
    largest = np.abs(x[7:]).reshape(43, -1, 16).max(axis=(1, 2), keepdims=True).reshape(43, 1)
    assert (np.abs(back[7:] - x[7:]) <= largest * 1.008 / 127 / 2).all()
    assert np.abs(q[7:]).max(axis=1).min() >= 126  # the scale is rounded up by 1/128 at most
    assert np.isnan(back).sum() == 32 + 32 + 16


def test_bf16_is_rounded_to_nearest_even(isa: str) -> None:
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x80000001]
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80, 0x7FC0, 0xFFFF, 0x8000]
    qkv = np.zeros((1, 24), np.float32)
    qkv[0, 16:] = np.array(bits, np.uint32).view(np.float32)
    key, value = np.zeros((1, 1, 1, 8), np.uint16), np.zeros((1, 1, 1, 8), np.uint16)
    zero = np.zeros((1, 4), np.float32)
    ops.rope_and_store(qkv, zero, zero, key, value, np.zeros(1, np.int64), 1)
    assert value.reshape(-1).tolist() == expected
    assert bf16(qkv[0, 16:]).tolist() == expected


# ---- bad input


def test_slots_and_token_ids_out_of_range_are_named() -> None:
    cache = np.zeros((2, 1, 4, 8), np.uint16)
    qkv, angle = np.zeros((1, 24), np.float32), np.zeros((1, 4), np.float32)
    for slot in (-1, 8):
        with pytest.raises(ValueError, match=rf"slot\[0\] is {slot}; expected 0 to 7"):
            ops.rope_and_store(qkv, angle, angle, cache, cache, np.array([slot], np.int64), 1)
    for token_id in (-1, 3):
        with pytest.raises(ValueError, match=rf"token_id\[0\] is {token_id}; expected 0 to 2"):
            ops.gather_rows(
                np.zeros((3, 8), np.uint16), np.array([token_id], np.int32), np.zeros((1, 8), np.float32)
            )
    bad_head = np.zeros((2, 1, 4, 12), np.uint16)
    with pytest.raises(ValueError, match="head size 12; expected a multiple of 8"):
        ops.rope_and_store(qkv, angle, angle, bad_head, bad_head, np.zeros(1, np.int64), 1)


def test_router_refuses_more_active_experts_than_there_are() -> None:
    with pytest.raises(ValueError, match="expert_id has 3 columns; expected 1 to 2"):
        ops.router(
            np.zeros((1, 8), np.float32),
            np.zeros((2, 8), np.uint16),
            np.zeros(2, np.float32),
            np.zeros((1, 3), np.int32),
            np.zeros((1, 3), np.float32),
        )


def test_empty_batch_is_no_work(isa: str) -> None:
    nothing = np.zeros((0, 8), np.float32)
    ops.rms_norm(nothing, np.ones(8, np.float32), 1e-5, nothing)
    ops.gather_rows(np.zeros((3, 8), np.uint16), np.zeros(0, np.int32), nothing)
    ops.router(
        nothing,
        np.zeros((2, 8), np.uint16),
        np.zeros(2, np.float32),
        np.zeros((0, 1), np.int32),
        np.zeros((0, 1), np.float32),
    )
