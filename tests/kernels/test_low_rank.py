"""Low-rank products, dense and of experts, on every instruction set against their specification.

Tolerance: float32 sums of at most a few thousand terms in another order, as in test_matmul.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.kernels import matmul, ops, reference_matmul, reference_ops, runtime
from tests.kernels.test_matmul import bf16, mxfp4, normal

Floats = npt.NDArray[np.float32]

native: Any = matmul
specification: Any = reference_matmul
LIMIT, ALPHA = 7.0, 1.702


def pair(seed: int, dtype: str, *shape: int, inputs: int, outputs: int, rank: int, scale: float) -> Any:
    a = normal(seed, *shape, rank, inputs) * np.float32(inputs**-0.5)
    b = normal(seed + 1, *shape, rank, outputs)
    return (bf16(a), bf16(b), scale) if dtype == "bf16" else (a, b, scale)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize(
    ("num_tokens", "inputs", "outputs", "rank"),
    [(1, 2880, 33, 16), (7, 96, 1500, 1), (13, 5, 7, 3), (3, 160, 1025, 6), (2, 64, 1, 65)],
)
def test_low_rank_is_the_specification(
    isa: str, dtype: str, num_tokens: int, inputs: int, outputs: int, rank: int
) -> None:
    x, out = normal(1, num_tokens, inputs), normal(2, num_tokens, outputs + 9)
    row = np.arange(0, num_tokens, 2, dtype=np.int32)
    weights = pair(3, dtype, inputs=inputs, outputs=outputs, rank=rank, scale=1.7)
    expected = out.copy()
    specification.low_rank(x, row, *weights, expected, 4)
    before = out.copy()
    native.low_rank(x, row, *weights, out, 4)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    changed = np.zeros(out.shape, bool)
    changed[row, 4 : 4 + outputs] = True
    np.testing.assert_array_equal(out[~changed], before[~changed])
    assert (out[row, 4 : 4 + outputs] != before[row, 4 : 4 + outputs]).mean() > 0.9


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_low_rank_of_a_row_is_the_same_alone_and_with_any_threads(isa: str, dtype: str) -> None:
    x = normal(1, 9, 100)
    weights = pair(3, dtype, inputs=100, outputs=2100, rank=5, scale=0.5)
    results = []
    for threads in (1, 2, 5):
        runtime.configure(isa, threads)
        out = np.zeros((9, 2100), np.float32)
        native.low_rank(x, np.arange(9, dtype=np.int32), *weights, out)
        results.append(out)
    alone = np.zeros((9, 2100), np.float32)
    for row in range(9):
        native.low_rank(x, np.array([row], np.int32), *weights, alone)
    for result in results:
        np.testing.assert_array_equal(result, alone)


def test_no_rows_change_nothing(isa: str) -> None:
    out = normal(1, 3, 8)
    before = out.copy()
    weights = pair(3, "float32", inputs=32, outputs=8, rank=2, scale=1.0)
    native.low_rank(normal(2, 3, 32), np.zeros(0, np.int32), *weights, out)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": [1, 1]}, r"row\[1\] is 1; expected 2 to 2"),
        ({"row": [3]}, r"row\[0\] is 3; expected 0 to 2"),
        ({"row": [-1]}, r"row\[0\] is -1"),
        ({"column": 1}, r"column is 1; expected 0 to 0"),
        ({"x": np.zeros((3, 31), np.float32)}, r"x has size 31 along axis 1; expected 32"),
        ({"b": np.zeros((3, 8), np.float32)}, r"b has size 3 along axis 0; expected 2"),
        ({"b": np.zeros((2, 8), np.uint16)}, r"b has the element format 'H'"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "x": np.zeros((3, 32), np.float32),
        "row": [0],
        "a": np.zeros((2, 32), np.float32),
        "b": np.zeros((2, 8), np.float32),
        "scale": 1.0,
        "out": np.zeros((3, 8), np.float32),
        "column": 0,
        **changes,
    }
    arguments["row"] = np.array(arguments["row"], np.int32)
    with pytest.raises(ValueError, match=message):
        native.low_rank(*arguments.values())


# ---- experts

E, D, F, A = 5, 96, 64, 2


def experts(kind: str) -> list[Any]:
    biases = bf16(normal(8, E, 2 * F)), bf16(normal(9, E, D))
    if kind == "mxfp4":
        return [*mxfp4(1, E, 2 * F, D), biases[0], *mxfp4(2, E, D, F), biases[1]]
    gate_up, down = normal(3, E, D, 2 * F), normal(4, E, F, D)
    return [bf16(gate_up * np.float32(0.1)), biases[0], bf16(down * np.float32(0.1)), biases[1]]


def route(num_tokens: int) -> tuple[Any, Any]:
    order = np.random.default_rng(7).permuted(np.tile(np.arange(E), (num_tokens, 1)), axis=1)
    return order[:, :A].astype(np.int32), np.abs(normal(6, num_tokens, A))


def adapters(dtype: str) -> list[Any]:
    gate_up = pair(20, dtype, E, inputs=D, outputs=2 * F, rank=3, scale=0.8)
    down = pair(30, dtype, E, inputs=F, outputs=D, rank=5, scale=0.6)
    return [(gate_up, down), (None, down), (gate_up, None), (None, None)]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 6, 150])
@pytest.mark.parametrize("kind", ["mxfp4", "bf16"])
def test_experts_with_adapters_are_the_specification(
    isa: str, kind: str, num_tokens: int, dtype: str
) -> None:
    x, (expert_id, weight) = normal(5, num_tokens, D), route(num_tokens)
    index = np.resize(np.array([0, -1, 1, 2, 3], np.int32), num_tokens)
    out, expected = np.zeros((num_tokens, D), np.float32), np.zeros((num_tokens, D), np.float32)
    extra = {"adapters": adapters(dtype), "adapter_T": index}
    name = f"moe_{kind}"
    arguments = (x, expert_id, weight, *experts(kind))
    getattr(native, name)(*arguments, out, LIMIT, ALPHA, **extra)
    getattr(specification, name)(*arguments, expected, LIMIT, ALPHA, **extra)
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    plain = np.zeros((num_tokens, D), np.float32)
    getattr(native, name)(*arguments, plain, LIMIT, ALPHA)
    has_adapter = np.logical_and(index >= 0, index < 3)
    np.testing.assert_array_equal(out[~has_adapter], plain[~has_adapter])
    assert (np.abs(out - plain).max(axis=1)[has_adapter] > 0.1).all()


def test_experts_of_a_token_with_adapter_are_the_same_alone_and_with_any_threads(isa: str) -> None:
    x, (expert_id, weight) = normal(5, 40, D), route(40)
    index = np.resize(np.array([0, -1, 1], np.int32), 40)
    results = []
    for threads in (1, 2, 5):
        runtime.configure(isa, threads)
        out = np.zeros((40, D), np.float32)
        arguments = (x, expert_id, weight, *experts("mxfp4"), out, LIMIT, ALPHA, "int8")
        native.moe_mxfp4(*arguments, adapters("bf16"), index)
        results.append(out)
    alone = np.zeros((40, D), np.float32)
    for t in range(40):
        row = slice(t, t + 1)
        arguments = (x[row], expert_id[row], weight[row], *experts("mxfp4"), alone[row], LIMIT, ALPHA, "int8")
        native.moe_mxfp4(*arguments, adapters("bf16"), index[row])
    for result in results:
        np.testing.assert_array_equal(result, alone)


def zeros(num_experts: int) -> Any:
    return np.zeros((num_experts, 2, D), np.float32), np.zeros((num_experts, 2, D), np.float32), 1.0


def test_packed_experts_take_adapters_to_the_same_bits(isa: str) -> None:
    x, (expert_id, weight) = normal(5, 40, D), route(40)
    index = np.resize(np.array([0, -1, 1], np.int32), 40)
    up, up_scales, up_bias, down, down_scales, down_bias = experts("mxfp4")
    packed = []
    for blocks, scales in ((up, up_scales), (down, down_scales)):
        shape = matmul.packed_shape(blocks.shape[1], blocks.shape[2] * 32)
        packed.append(np.zeros((E, *shape), np.uint8))
        for expert in range(E):
            matmul.pack_mxfp4(blocks[expert], scales[expert], packed[-1][expert])
    outs = np.zeros((2, 40, D), np.float32)
    given = (LIMIT, ALPHA, adapters("bf16"), index)
    native.moe_packed(x, expert_id, weight, packed[0], up_bias, packed[1], down_bias, outs[0], *given)
    arguments = (x, expert_id, weight, *experts("mxfp4"), outs[1], LIMIT, ALPHA, "int8")
    native.moe_mxfp4(*arguments, adapters("bf16"), index)
    np.testing.assert_array_equal(outs[0], outs[1])


@pytest.mark.parametrize(
    ("list_", "index", "message"),
    [
        ([(None, None)], [1], r"adapter_T holds 1 for token 0; expected -1 to 0"),
        ([(None, None)], [-2], r"adapter_T holds -2 for token 0"),
        ([(None, None)], [0, 0], r"adapter_T has size 2 along axis 0; expected 1"),
        ([(None,)], [0], r"adapter has 1 parts; expected gate_up and down"),
        ([(zeros(E), None)], [0], "takes 96 inputs to 96 outputs; expected 96 and 128"),
        ([(zeros(4), None)], [0], "a has size 4 along axis 0; expected 5"),
    ],
)
def test_wrong_adapters_are_named(list_: Any, index: list[int], message: str) -> None:
    x, (expert_id, weight) = normal(5, 1, D), route(1)
    arguments = (x, expert_id, weight, *experts("mxfp4"), np.zeros((1, D), np.float32), LIMIT, ALPHA, "int8")
    with pytest.raises(ValueError, match=message):
        native.moe_mxfp4(*arguments, list_, np.array(index, np.int32))


def test_router_adds_the_extra_logits(isa: str) -> None:
    x, weight, bias = normal(1, 6, 96), bf16(normal(2, 9, 96) * np.float32(0.1)), normal(3, 9)
    extra = normal(4, 6, 9) * np.float32(3)
    extra[0] = 0
    results = []
    for function, given in ((ops.router, extra), (reference_ops.router, extra), (ops.router, None)):
        expert_id, expert_weight = np.zeros((6, 4), np.int32), np.zeros((6, 4), np.float32)
        function(x, weight, bias, expert_id, expert_weight, given)
        results.append((expert_id, expert_weight))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(results[0][1][0], results[2][1][0])
    assert not np.array_equal(results[0][0], results[2][0])
