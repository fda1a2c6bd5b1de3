"""Every kernel of kernels/matmul.py, on every instruction set of this machine, against its specification.

Tolerance of a product: the integer part is exact, so what differs is the order of float32 sums of at most a
few thousand terms: 1e-5 of the sum of |activation| |weight| is far above that and far below any error in
layout.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.kernels import matmul, reference_matmul, runtime
from harmonium.kernels.matmul import Activations

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]

ACTIVATIONS: tuple[Activations, ...] = ("int8", "bf16")
LIMIT, ALPHA = 7.0, 1.702

# mypy cannot count starred arguments, so the functions that take a layer's arrays are called untyped.
native: Any = matmul
specification: Any = reference_matmul

# Outputs with and without a tail of a panel (16), a tile (32) and four rows; inputs with and without a tail
# of a group (128); tokens around tiles of 4, the switch from rows to panels, and tasks of 128.
SHAPES = [
    (1, 32, 1),
    (5, 32, 2),
    (16, 64, 3),
    (31, 96, 4),
    (33, 128, 5),
    (37, 160, 6),
    (64, 288, 7),
    (100, 96, 13),
    (17, 2880, 1),
    (48, 64, 140),
    (20, 32, 515),
]


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bf16(x: Floats) -> Bits:
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: Bits) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mxfp4(seed: int, *shape: int) -> tuple[Bytes, Bytes]:
    """Random blocks and scales of a weight [..., N, K]; scales around 2^-5."""
    rng = np.random.default_rng(seed)
    *rows, inputs = shape
    blocks = rng.integers(0, 256, (*rows, inputs // 32, 16), np.uint8)
    return blocks, rng.integers(118, 126, (*rows, inputs // 32), np.uint8)


def assert_product(out: Floats, expected: Floats, x: Floats, weight: Floats) -> None:
    reach = np.abs(x) @ np.abs(weight).T
    assert np.all(np.abs(out - expected) <= 1e-5 * reach + 1e-6), np.max(
        np.abs(out - expected) / (reach + 1e-30)
    )


# ---- dense


@pytest.mark.parametrize(("num_outputs", "num_inputs", "num_tokens"), SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_dense_products_are_the_specification(
    isa: str, num_outputs: int, num_inputs: int, num_tokens: int, add: bool
) -> None:
    x, weight = normal(1, num_tokens, num_inputs), bf16(normal(2, num_outputs, num_inputs))
    bias = bf16(normal(3, num_outputs))
    for given in (bias, None):
        out, expected = normal(4, num_tokens, num_outputs), normal(4, num_tokens, num_outputs)
        matmul.linear_int8(x, matmul.quantize_weight(weight), given, out, add)
        reference_matmul.linear_int8(x, weight, given, expected, add)
        assert_product(out, expected, x, from_bf16(weight))
        out, expected = normal(4, num_tokens, num_outputs), normal(4, num_tokens, num_outputs)
        matmul.linear_bf16(x, weight, given, out, add)
        reference_matmul.linear_bf16(x, weight, given, expected, add)
        assert_product(out, expected, x, from_bf16(weight))


def unpacked(weight: matmul.Int8Weight) -> tuple[npt.NDArray[np.int32], Floats]:
    """q [N, K] and scale [N, K/32] out of the panels, read as docs/kernels.md describes them."""
    num_blocks = weight.num_inputs // 32
    pairs = weight.panels.reshape(len(weight.panels), -1, 1088)
    blocks = pairs[..., 64:].reshape(len(pairs), -1, 512)[:, :num_blocks]
    # [panel, block, parity, four, row, within] -> [panel, row, block, four, within, parity]
    q = blocks.reshape(-1, num_blocks, 2, 4, 16, 4).transpose(0, 4, 1, 3, 5, 2)
    scale = pairs[..., :64].copy().view(np.uint16).reshape(len(pairs), -1, 16)[:, :num_blocks]
    scale_rows = scale.transpose(0, 2, 1).reshape(-1, num_blocks)
    rows = q.reshape(-1, weight.num_inputs).astype(np.int32) - 128
    return rows[: weight.num_outputs], from_bf16(scale_rows[: weight.num_outputs])


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 32), (16, 64), (37, 96), (64, 288)])
def test_quantized_weight_is_the_specification_to_the_bit(
    isa: str, num_outputs: int, num_inputs: int
) -> None:
    values = normal(1, num_outputs, num_inputs)
    values[0, :32] = 0
    values *= 10.0 ** np.random.default_rng(2).integers(-30, 30, (num_outputs, 1))
    values[-1, -32:] = 1e-40  # a denormal block
    weight = bf16(values.astype(np.float32))
    q, scale = unpacked(matmul.quantize_weight(weight))
    expected_q, expected_scale = reference_matmul.quantize_weight(weight)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(q, expected_q)
    assert np.abs(q).max() <= 127


def test_weight_that_is_not_finite_makes_only_its_output_nan(isa: str) -> None:
    weight = bf16(normal(1, 20, 64))
    weight[3, 40] = 0x7F80  # infinity
    weight[17, 0] = 0x7FC0  # NaN
    out = np.zeros((2, 20), np.float32)
    matmul.linear_int8(normal(2, 2, 64), matmul.quantize_weight(weight), None, out)
    assert np.array_equal(np.isnan(out).all(axis=0), np.isin(np.arange(20), [3, 17]))


# ---- MXFP4


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("num_outputs", "num_inputs", "num_tokens"), SHAPES)
def test_mxfp4_product_is_the_specification(
    isa: str, num_outputs: int, num_inputs: int, num_tokens: int, activations: Activations
) -> None:
    x, (blocks, scales) = normal(1, num_tokens, num_inputs), mxfp4(2, num_outputs, num_inputs)
    bias = bf16(normal(3, num_outputs))
    out, expected = np.full((2, num_tokens, num_outputs), np.nan, np.float32)
    matmul.matmul_mxfp4(x, blocks, scales, bias, out, activations)
    reference_matmul.matmul_mxfp4(x, blocks, scales, bias, expected, activations)
    assert_product(out, expected, x, reference_matmul.decode_mxfp4(blocks, scales))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_mxfp4_reads_every_element_value_and_place(
    isa: str, num_tokens: int, activations: Activations
) -> None:
    """One input at a time is 1: the output must be the weight's element, exactly."""
    blocks, scales = mxfp4(5, 19, 160)
    weight = reference_matmul.decode_mxfp4(blocks, scales)
    for start in range(0, 160, num_tokens):
        x = np.zeros((num_tokens, 160), np.float32)
        rows = np.arange(min(num_tokens, 160 - start))
        x[rows, start + rows] = 1.0
        out = np.full((num_tokens, 19), np.nan, np.float32)
        matmul.matmul_mxfp4(x, blocks, scales, None, out, activations)
        # int8: 127 * (1 / 127 rounded) is 1 to within a unit in the last place.
        np.testing.assert_allclose(out[rows], weight[:, start + rows].T, rtol=2e-7, atol=0)


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_extreme_scales_keep_their_meaning(isa: str, num_tokens: int) -> None:
    """Scale byte 0 is 2^-127 (not zero), 254 is 2^127, 255 is NaN for its output alone."""
    blocks = np.full((35, 2, 16), 0x22, np.uint8)  # every element 1
    scales = np.full((35, 2), 127, np.uint8)
    scales[1], scales[2], scales[34, 1] = 0, 254, 255
    for power, row, expected in [(20, 1, 2.0**-101), (-10, 2, 2.0**123)]:
        x = np.full((num_tokens, 64), 2.0**power, np.float32)
        out = np.zeros((num_tokens, 35), np.float32)
        matmul.matmul_mxfp4(x, blocks, scales, None, out)
        np.testing.assert_allclose(out[:, row], expected, rtol=1e-6)
        np.testing.assert_allclose(out[:, 3:34], 2.0 ** (6 + power), rtol=1e-6)
        assert np.isnan(out[:, 34]).all()


# ---- activations


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_tokens", [3, 12])
def test_activation_that_is_not_finite_makes_only_its_token_nan(
    isa: str, bad: float, num_tokens: int
) -> None:
    x = normal(1, num_tokens, 96)
    x[1, 50] = bad
    blocks, scales = mxfp4(2, 40, 96)
    out = np.zeros((num_tokens, 40), np.float32)
    matmul.matmul_mxfp4(x, blocks, scales, None, out)
    assert np.array_equal(np.isnan(out).all(axis=1), np.arange(num_tokens) == 1)
    assert np.isfinite(np.delete(out, 1, axis=0)).all()
    matmul.linear_int8(x, matmul.quantize_weight(bf16(normal(3, 40, 96))), None, out)
    assert np.array_equal(np.isnan(out).all(axis=1), np.arange(num_tokens) == 1)


@pytest.mark.parametrize("num_tokens", [1, 12])
def test_zero_and_tiny_activations_give_the_bias(isa: str, num_tokens: int) -> None:
    x = np.zeros((num_tokens, 160), np.float32)
    x[:, 40] = 1e-41
    blocks, scales = mxfp4(2, 21, 160)
    bias = bf16(normal(3, 21))
    out = np.full((num_tokens, 21), np.nan, np.float32)
    matmul.matmul_mxfp4(x, blocks, scales, bias, out)
    np.testing.assert_array_equal(out, np.broadcast_to(from_bf16(bias), out.shape))


def test_activations_round_to_nearest_even_bf16(isa: str) -> None:
    """Against a weight of ones in one place: the output is the rounded input, ties included."""
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF818000], np.uint32)
    x = np.zeros((len(bits), 32), np.float32)
    x[:, 7] = bits.view(np.float32)
    weight = np.zeros((1, 32), np.float32)
    weight[0, 7] = 1
    out = np.zeros((len(bits), 1), np.float32)
    matmul.linear_bf16(x, bf16(weight), None, out)
    expected = np.array([0x3F80, 0x3F80, 0x3F82, 0x3F80, 0x3F81, 0xBF82], np.uint16)
    np.testing.assert_array_equal(bf16(out[:, 0]), expected)


# ---- experts


@dataclass(frozen=True)
class Layer:
    """Random experts with pairwise different sizes, MXFP4 and the same values in bf16."""

    gate_up: tuple[Bytes, Bytes]
    gate_up_bias: Bits
    down: tuple[Bytes, Bytes]
    down_bias: Bits

    @classmethod
    def random(cls, seed: int, num_experts: int, hidden: int, size: int) -> Layer:
        gate_up, down = mxfp4(seed, num_experts, 2 * size, hidden), mxfp4(seed + 1, num_experts, hidden, size)
        up_bias, down_bias = normal(seed + 2, num_experts, 2 * size), normal(seed + 3, num_experts, hidden)
        return cls(gate_up, bf16(up_bias), down, bf16(down_bias))

    @property
    def mxfp4(self) -> tuple[Any, ...]:
        return (*self.gate_up, self.gate_up_bias, *self.down, self.down_bias)

    @property
    def bf16(self) -> tuple[Any, ...]:
        gate_up, down = (
            reference_matmul.decode_mxfp4(*self.gate_up),
            reference_matmul.decode_mxfp4(*self.down),
        )
        return bf16(gate_up.swapaxes(1, 2)), self.gate_up_bias, bf16(down.swapaxes(1, 2)), self.down_bias


def routes(
    seed: int, num_tokens: int, num_experts: int, num_active: int
) -> tuple[npt.NDArray[np.int32], Floats]:
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(num_experts, num_active, replace=False) for _ in range(num_tokens)]
    return np.array(chosen, np.int32).reshape(num_tokens, num_active), rng.random(
        (num_tokens, num_active), np.float32
    )


def assert_experts(out: Floats, expected: Floats) -> None:
    """1e-2 of the largest output: float sums that differ in the last place may turn the rounding of a unit
    between the two products (int8: 1/127, bf16: 1/256 of it), which then changes single outputs by so much.
    """
    assert np.all(np.isfinite(out))
    assert np.max(np.abs(out - expected)) <= 1e-2 * np.max(np.abs(expected))
    # Nearly all units round the same way, so the outputs agree far better on the whole.
    assert np.linalg.norm(out - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("num_experts", "num_active", "hidden", "size", "num_tokens"),
    [
        (5, 2, 96, 64, 1),
        (5, 2, 96, 64, 3),
        (5, 2, 96, 64, 61),
        (1, 1, 32, 160, 9),
        (9, 8, 64, 32, 6),
        (4, 1, 64, 288, 2),
    ],
)
def test_experts_are_the_specification(
    isa: str, num_experts: int, num_active: int, hidden: int, size: int, num_tokens: int
) -> None:
    layer = Layer.random(1, num_experts, hidden, size)
    x = normal(5, num_tokens, hidden)
    route = routes(6, num_tokens, num_experts, num_active)
    for activations in ACTIVATIONS:
        out, expected = normal(7, num_tokens, hidden), normal(7, num_tokens, hidden)
        native.moe_mxfp4(x, *route, *layer.mxfp4, out, LIMIT, ALPHA, activations)
        specification.moe_mxfp4(x, *route, *layer.mxfp4, expected, LIMIT, ALPHA, activations)
        assert_experts(out, expected)
    out, expected = normal(7, num_tokens, hidden), normal(7, num_tokens, hidden)
    native.moe_bf16(x, *route, *layer.bf16, out, LIMIT, ALPHA)
    specification.moe_bf16(x, *route, *layer.bf16, expected, LIMIT, ALPHA)
    assert_experts(out, expected)


def test_one_expert_may_get_every_token(isa: str) -> None:
    layer = Layer.random(1, 4, 64, 96)
    x, expert_id, weight = normal(2, 300, 64), np.full((300, 1), 2, np.int32), normal(3, 300, 1)
    out, expected = np.zeros((2, 300, 64), np.float32)
    native.moe_mxfp4(x, expert_id, weight, *layer.mxfp4, out, LIMIT, ALPHA)
    specification.moe_mxfp4(x, expert_id, weight, *layer.mxfp4, expected, LIMIT, ALPHA)
    assert_experts(out, expected)


def test_swiglu_clamps_gate_above_and_up_on_both_sides(isa: str) -> None:
    """Biases drive the units: x is zero, a unit is SwiGLU of its bias, and down hands the first eight on."""
    gate = np.array([-90.0, -3.0, 0.0, 2.0, 6.5, 50.0, 3.0, 3.0], np.float32)
    up = np.array([1.0, -90.0, 2.0, 90.0, -7.5, 50.0, 0.5, -1.0], np.float32)
    gate_up_bias = np.zeros((1, 64), np.float32)
    gate_up_bias[0, 0:16:2], gate_up_bias[0, 1:16:2] = gate, up
    identity = np.zeros((1, 32, 32), np.float32)
    identity[0, np.arange(8), np.arange(8)] = 1
    weights = (
        np.zeros((1, 32, 64), np.uint16),
        bf16(gate_up_bias),
        bf16(identity),
        np.zeros((1, 32), np.uint16),
    )
    out = np.zeros((1, 32), np.float32)
    one = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    native.moe_bf16(np.zeros((1, 32), np.float32), *one, *weights, out, LIMIT, ALPHA)
    g, u = np.minimum(gate.astype(np.float64), 7), np.clip(up.astype(np.float64), -7, 7)
    expected = g / (1 + np.exp(-1.702 * g)) * (u + 1)
    np.testing.assert_allclose(out[0, :8], expected, rtol=2.0**-8, atol=1e-30)  # units are rounded to bf16


def test_nan_passes_through_the_clamps(isa: str) -> None:
    layer = Layer.random(1, 2, 64, 32)
    x = normal(2, 2, 64)
    x[0, 0] = np.nan
    out = np.zeros((2, 64), np.float32)
    native.moe_mxfp4(
        x, np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32), *layer.mxfp4, out, LIMIT, ALPHA
    )
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


# ---- laws


def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    layer = Layer.random(1, 7, 96, 64)
    weight = bf16(normal(2, 133, 96))
    for num_tokens in (1, 3, 50):
        x, route = normal(3, num_tokens, 96), routes(4, num_tokens, 7, 3)
        results = []
        for threads in (1, 2, 5):
            runtime.configure(isa, threads)
            dense, exact = np.zeros((2, num_tokens, 133), np.float32)
            out, plain = np.zeros((2, num_tokens, 96), np.float32)
            matmul.linear_int8(x, matmul.quantize_weight(weight), None, dense)
            matmul.linear_bf16(x, weight, None, exact)
            native.moe_mxfp4(x, *route, *layer.mxfp4, out, LIMIT, ALPHA)
            native.moe_bf16(x, *route, *layer.bf16, plain, LIMIT, ALPHA)
            results.append(b"".join(a.tobytes() for a in (dense, exact, out, plain)))
        assert results[0] == results[1] == results[2]


def test_a_tokens_result_does_not_depend_on_the_others_of_the_step(isa: str) -> None:
    """To the bit, whichever kernel the number of tokens chooses: batching and chunking change no answer."""
    layer = Layer.random(1, 3, 160, 64)
    weight = bf16(normal(2, 53, 160))
    panels = matmul.quantize_weight(weight)
    x, (expert_id, expert_weight) = normal(3, 60, 160), routes(4, 60, 3, 2)

    def compute(rows: slice) -> tuple[Floats, ...]:
        count = len(x[rows])
        outs = tuple(np.zeros((count, size), np.float32) for size in (53, 53, 128, 128, 160, 160, 160))
        matmul.linear_int8(x[rows], panels, None, outs[0])
        matmul.linear_bf16(x[rows], weight, None, outs[1])
        for out, activations in zip(outs[2:4], ACTIVATIONS, strict=True):
            matmul.matmul_mxfp4(x[rows], layer.gate_up[0][0], layer.gate_up[1][0], None, out, activations)
        route = expert_id[rows], expert_weight[rows]
        for out, activations in zip(outs[4:6], ACTIVATIONS, strict=True):
            native.moe_mxfp4(x[rows], *route, *layer.mxfp4, out, LIMIT, ALPHA, activations)
        native.moe_bf16(x[rows], *route, *layer.bf16, outs[6], LIMIT, ALPHA)
        return outs

    whole = compute(slice(0, 60))
    for first, last in [(0, 1), (7, 9), (20, 25), (30, 41), (41, 60)]:
        for out, expected in zip(compute(slice(first, last)), whole, strict=True):
            np.testing.assert_array_equal(out, expected[first:last])


def test_no_tokens_is_no_work(isa: str) -> None:
    layer = Layer.random(1, 3, 64, 32)
    none = np.zeros((0, 64), np.float32)
    matmul.linear_bf16(none, bf16(normal(1, 8, 64)), None, np.zeros((0, 8), np.float32))
    empty = np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32)
    native.moe_mxfp4(none, *empty, *layer.mxfp4, np.zeros((0, 64), np.float32), LIMIT, ALPHA)


def test_weights_may_be_read_only_and_are_not_copied(isa: str) -> None:
    blocks, scales = mxfp4(1, 512, 1024)
    blocks.flags.writeable = scales.flags.writeable = False
    x, out = normal(2, 1, 1024), np.zeros((1, 512), np.float32)
    tracemalloc.start()
    matmul.matmul_mxfp4(x, blocks, scales, None, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < blocks.nbytes // 4
    assert np.abs(out).max() > 0


# ---- refusals


def test_wrong_arrays_are_named_with_what_was_expected() -> None:
    x, weight, out = normal(1, 2, 64), bf16(normal(2, 8, 64)), np.zeros((2, 8), np.float32)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("x is a list; expected a C-contiguous float32 array of rank 2", ([1.0], weight, None, out)),
        (
            "x has the element format 'd'; expected a C-contiguous float32",
            (x.astype(float), weight, None, out),
        ),
        ("x has rank 1; expected", (x[0], weight, None, out)),
        ("x is not contiguous", (normal(1, 2, 128)[:, ::2], weight, None, out)),
        ("x has size 32 along axis 1; expected 64", (normal(1, 2, 32), weight, None, out)),
        ("weight has 40 inputs; expected a multiple of 32", (x, bf16(normal(1, 8, 40)), None, out)),
        ("bias has size 9 along axis 0; expected 8", (x, weight, np.zeros(9, np.uint16), out)),
        ("out has size 3 along axis 0; expected 2", (x, weight, None, np.zeros((3, 8), np.float32))),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            matmul.linear_bf16(*arguments)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        matmul.linear_bf16(x, weight, None, out)
    with pytest.raises(ValueError, match=r"weight has shape \(8, 40\)"):
        matmul.quantize_weight(bf16(normal(1, 8, 40)))


def test_expert_ids_out_of_range_are_refused() -> None:
    layer = Layer.random(1, 3, 64, 32)
    x, out, weight = normal(2, 2, 64), np.zeros((2, 64), np.float32), np.ones((2, 2), np.float32)
    for bad in (-1, 3):
        with pytest.raises(IndexError, match=f"expert_id holds {bad} for token 1; expected 0 to 2"):
            native.moe_mxfp4(
                x, np.array([[0, 1], [2, bad]], np.int32), weight, *layer.mxfp4, out, LIMIT, ALPHA
            )
    assert not out.any()
    with pytest.raises(ValueError, match="activations is 'fp8'; expected 'int8' or 'bf16'"):
        good = np.zeros((2, 2), np.int32)
        native.moe_mxfp4(x, good, weight, *layer.mxfp4, out, LIMIT, ALPHA, "fp8")


def test_memory_that_does_not_exist_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        matmul.allocate(1 << 50)
    assert matmul.allocate(0).size == 0


def test_scratch_is_stated_for_the_memory_plan() -> None:
    """At 512 tokens of the 20b shape: int8 or bf16 rows of x and of the units, and float32 parts."""
    shared = matmul.matmul_scratch_bytes(512, 2880, 2880, 4, 4096, 0)
    assert shared == 512 * 2880 * 2 + 2048 * 2880 * 2 + 2048 * 2880 * 4
    assert matmul.matmul_scratch_bytes(512, 2880, 2880, 4, 4096, 2) - shared < 2 << 20


# ---- limits of the machine


def test_limits_are_measured_for_the_threads_in_use(isa: str) -> None:
    runtime.configure(isa, 1)
    assert matmul.measure_int8_ops(50) > 1e6
    assert matmul.measure_bf16_ops(50) > 1e6
    data = matmul.allocate(1 << 20)
    data[:] = 1
    assert matmul.measure_read_bandwidth(data, 2) > 1e6
    with pytest.raises(ValueError, match="data has 10 bytes; expected at least 1 MiB"):
        matmul.measure_read_bandwidth(np.zeros(10, np.uint8))
