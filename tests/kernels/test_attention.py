"""Paged attention, on every instruction set of this machine, against a dense softmax in float64.

The cache is bf16 or int8: the dense answer is that of the numbers which the cache holds.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.kernels import ops, reference_ops, runtime

Floats = npt.NDArray[np.float32]


def normal(seed: int, *shape: int, spread: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


Cache = Literal["bf16", "int8"]
CACHES: tuple[Cache, ...] = ("bf16", "int8")


def bf16(x: Floats) -> npt.NDArray[np.uint16]:
    return reference_ops.round_to_bf16(x)


class Case:
    """Sequences of random keys and values in a shuffled cache, and the dense answer in float64."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        H: int,
        G: int,
        P: int,
        K: int,
        window: int,
        seed: int = 0,
        cache: Cache = "bf16",
    ) -> None:
        """sequences: (context length, tokens of this step) each."""
        random = np.random.default_rng(seed)
        self.H, self.K, self.window, self.scale = H, K, window, K**-0.5
        num_tokens = sum(count for _, count in sequences)
        self.qkv = normal(seed + 1, num_tokens, (H + 2 * G) * K, spread=2)
        self.sink = normal(seed + 2, H, spread=2)
        self.query_start = np.cumsum([0] + [count for _, count in sequences]).astype(np.int32)
        self.context_length = np.array([context for context, _ in sequences], np.int32)
        blocks_each = [-(-context // P) for context, _ in sequences]
        num_blocks = sum(blocks_each) + 1
        ids = iter(random.permutation(num_blocks).tolist())
        # What is not to be read is NaN in the cache and -1 in the table.
        self.key: Any = np.full((num_blocks, G, P, K), 0x7FC0, np.uint16)
        self.value: Any = np.full((num_blocks, G, P, K), 0x7FC0, np.uint16)
        self.scales: list[Any] = [None, None]
        if cache == "int8":
            self.key, self.value = (np.full((num_blocks, G, P, K), 99, np.int8) for _ in range(2))
            self.scales = [np.full((num_blocks, G, P, -(-K // 32)), 0x7FC0, np.uint16) for _ in range(2)]
        self.block = np.full((len(sequences), max(blocks_each) + 2), -1, np.int32)
        self.expected = np.empty((num_tokens, H * K))
        for s, (context, count) in enumerate(sequences):
            numbers = [normal(seed + 9 + s + i, context, G, K, spread=1.5) for i in (0, 1000)]
            first_seen = max(0, context - count - window + 1) if window else 0
            for p in range(first_seen, context):
                if self.block[s, p // P] < 0:
                    self.block[s, p // P] = next(ids)
            seen = np.arange(first_seen, context)
            places = self.block[s, seen // P], slice(None), seen % P
            dense = [
                self._store(array, scale, x, places, seen)
                for array, scale, x in zip((self.key, self.value), self.scales, numbers, strict=True)
            ]
            rows = slice(self.query_start[s], self.query_start[s + 1])
            self.expected[rows] = self._dense(self.qkv[rows], *dense)

    @staticmethod
    def _store(array: Any, scale: Any, numbers: Floats, places: Any, seen: Any) -> Floats:
        """Put the positions that may be seen into the cache; all numbers as a cache holds them."""
        if scale is None:
            array[places] = bf16(numbers[seen])
            return reference_ops.float32_from_bf16(bf16(numbers))
        q, scales = reference_ops.quantize_heads(numbers)
        array[places], scale[places] = q[seen], scales[seen]
        return reference_ops.float32_from_int8(q, scales)

    def _dense(self, qkv: Floats, key: Floats, value: Floats) -> npt.NDArray[np.float64]:
        """Softmax over the whole matrix of scores with a column of sinks, as the paper's formula has it."""
        count, context, group = len(qkv), len(key), self.H // key.shape[1]
        q = qkv[:, : self.H * self.K].reshape(count, self.H, self.K).astype(np.float64)
        k, v = (np.repeat(x, group, axis=1).astype(np.float64) for x in (key, value))
        score = np.einsum("qhk,chk->hqc", q, k) * self.scale
        query_position = np.arange(context - count, context)[:, None]
        position = np.arange(context)[None, :]
        masked = position > query_position
        if self.window:
            masked |= position <= query_position - self.window
        score[:, masked] = -np.inf
        sink = np.broadcast_to(self.sink[:, None, None].astype(np.float64), (self.H, count, 1))
        score = np.concatenate([score, sink], axis=2)
        weight = np.exp(score - score.max(axis=2, keepdims=True))
        weight /= weight.sum(axis=2, keepdims=True)
        out: npt.NDArray[np.float64] = np.einsum("hqc,chk->qhk", weight[..., :-1], v)
        return out.reshape(count, -1)

    def run(self, function: Any = ops.attention) -> Floats:
        out = np.full(self.expected.shape, np.nan, np.float32)
        function(
            self.qkv,
            self.key,
            self.value,
            self.block,
            self.query_start,
            self.context_length,
            self.sink,
            self.window,
            self.scale,
            out,
            *self.scales,
        )
        return out

    def check(self, out: Floats) -> None:
        # Scores reach 15, where float32 steps by 1e-6, and values reach 6: outputs are off by a few 1e-6.
        np.testing.assert_allclose(out, self.expected, rtol=1e-5, atol=1e-5)


SHAPES = {
    "test model": (12, 4, 8, 16),
    "gpt-oss": (16, 2, 32, 64),
    "odd": (10, 2, 5, 24),
    "wide": (3, 3, 16, 80),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 8, 128])
def test_attention_of_mixed_batch_is_dense_softmax_with_sinks(
    isa: str, shape: str, window: int, cache: Cache
) -> None:
    contexts = [1, 31, 32, 33, 127, 128, 129, 130]
    sequences = [(150, 150), *((context, 1) for context in contexts), (140, 37), (70, 2)]
    case = Case(sequences, *SHAPES[shape], window, cache=cache)
    case.check(case.run())


@pytest.mark.parametrize(("context", "cache"), [(1000, "bf16"), (5000, "bf16"), (1000, "int8")])
@pytest.mark.parametrize("num_new", [1, 3, 20, 64, 100])
@pytest.mark.parametrize("window", [0, 128])
def test_attention_of_long_context_is_dense_softmax_with_sinks(
    isa: str, context: int, num_new: int, window: int, cache: Cache
) -> None:
    case = Case([(context, num_new)], 8, 1, 32, 64, window, seed=context, cache=cache)
    case.check(case.run())


@pytest.mark.parametrize("cache", CACHES)
def test_attention_specification_is_dense_softmax_with_sinks(cache: Cache) -> None:
    case = Case([(40, 40), (33, 1), (70, 5)], *SHAPES["wide"], 8, cache=cache)
    case.check(case.run(reference_ops.attention))


@pytest.mark.parametrize("sink", [-np.inf, -80.0, 80.0, 1000.0])
def test_attention_holds_for_extreme_sinks_and_scores(isa: str, sink: float) -> None:
    case = Case([(600, 1), (40, 40)], *SHAPES["test model"], 0)
    case.sink[:] = sink
    case.qkv *= 30  # scores of several hundred
    out, expected = case.run(), np.empty_like(case.expected, dtype=np.float32)
    reference_ops.attention(
        case.qkv,
        case.key,
        case.value,
        case.block,
        case.query_start,
        case.context_length,
        case.sink,
        0,
        case.scale,
        expected,
    )
    # A score of 1000 has an error of about 1e-4 in float32, and a weight the same relative error.
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-3)


def test_attention_takes_a_checkpoints_bf16_sinks(isa: str) -> None:
    case = Case([(40, 3)], *SHAPES["test model"], 0)
    bits = bf16(case.sink)
    case.sink = reference_ops.float32_from_bf16(bits)
    expected = case.run()
    case.sink = bits  # type: ignore[assignment]
    np.testing.assert_array_equal(case.run(), expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("window", [0, 8])
def test_attention_is_bitwise_the_same_for_any_number_of_threads(isa: str, window: int, cache: Cache) -> None:
    case = Case([(1500, 1), (90, 60), (700, 3)], *SHAPES["test model"], window, cache=cache)
    runtime.configure(isa, 1)
    one = case.run()
    for threads in (2, 3):
        runtime.configure(isa, threads)
        np.testing.assert_array_equal(case.run(), one)


@pytest.mark.parametrize("window", [0, 128])
def test_attention_of_a_sequence_does_not_depend_on_the_batch(isa: str, window: int) -> None:
    sequences = [(1300, 1), (200, 20), (33, 1)]
    case = Case(sequences, *SHAPES["gpt-oss"], window)
    together = case.run()
    for s in range(len(sequences)):
        rows = slice(case.query_start[s], case.query_start[s + 1])
        out = np.empty_like(together[rows])
        count = np.array([0, sequences[s][1]], np.int32)
        ops.attention(
            case.qkv[rows],
            case.key,
            case.value,
            case.block[s : s + 1],
            count,
            case.context_length[s : s + 1],
            case.sink,
            window,
            case.scale,
            out,
        )
        np.testing.assert_array_equal(out, together[rows])


def test_attention_scratch_grows_with_what_it_pays_for() -> None:
    def at(tokens: int, sequences: int, context: int, threads: int) -> int:
        return ops.attention_scratch_bytes(64, 8, 64, tokens, sequences, context, threads)

    assert at(1, 1, 512, 1) < at(1, 1, 512, 2) < at(1, 1, 131072, 2) < at(8, 8, 131072, 2)
    # One sequence decoding at full context: about 270 bytes a head for each piece of 512 positions.
    assert at(1, 1, 131072, 2) < 8 << 20
    assert at(512, 8, 131072, 2) < 256 << 20


def attention_error(**changes: Any) -> str:
    case = Case([(40, 3), (20, 1)], *SHAPES["test model"], 8)
    for name, value in changes.items():
        setattr(case, name, value)
    with pytest.raises(ValueError) as caught:
        case.run()
    return str(caught.value)


def test_attention_names_the_argument_that_is_wrong() -> None:
    case = Case([(40, 3), (20, 1)], *SHAPES["test model"], 8)
    assert attention_error(qkv=case.qkv.astype(np.float64)) == "qkv has dtype float64; expected float32"
    assert attention_error(qkv=case.qkv[:, 1:]).startswith("qkv has shape [4, 319]; expected [4, 320]")
    assert attention_error(key=case.key[..., 0]).endswith("expected 4 dimensions")
    assert attention_error(value=case.value[1:]).startswith("value_cache has shape")
    int8 = case.key.astype(np.int8)
    assert attention_error(key=int8) == "value_cache has dtype uint16; expected int8"
    assert (
        attention_error(key=int8, value=int8)
        == "key_cache is int8 and key_scale is None; expected its scales"
    )
    scale = np.zeros((*int8.shape[:3], 1), np.uint16)
    assert "is given; a bf16 cache has none" in attention_error(scales=[scale, scale])
    wrong = attention_error(key=int8, value=int8, scales=[scale, scale[..., 0]])
    assert wrong.startswith("value_scale has shape") and wrong.endswith("4, 8, 1]")
    assert (
        attention_error(sink=case.sink[:5]) == "num_heads is 5; expected a multiple of the cache's 4 kv heads"
    )
    assert attention_error(block=case.block.astype(np.int64)) == "block has dtype int64; expected int32"
    assert attention_error(window=-1) == "window is -1; expected 0 (full) or more"
    assert "strided" in attention_error(qkv=np.repeat(case.qkv, 2, axis=0)[::2])


def test_attention_names_the_block_or_length_that_is_wrong() -> None:
    case = Case([(40, 3), (20, 1)], *SHAPES["test model"], 8)
    case.block[0, 4] = -1
    assert attention_error(block=case.block).startswith("block[0, 4] is -1; expected 0 to ")
    case.block[0, 4] = len(case.key)
    assert attention_error(block=case.block).startswith(f"block[0, 4] is {len(case.key)}; expected")
    too_long = np.array([40, 57], np.int32)
    assert "context_length[1] is 57; expected 1 (its tokens) to 56" in attention_error(
        context_length=too_long
    )
    too_short = np.array([2, 20], np.int32)
    assert attention_error(context_length=too_short).startswith("context_length[0] is 2; expected 3")
    assert (
        attention_error(query_start=np.array([0, 3, 2], np.int32))
        == "query_start[2] is 2; expected at least 3"
    )
    assert "query_start ends at 3" in attention_error(query_start=np.array([0, 2, 3], np.int32))
    assert attention_error(query_start=np.array([1, 3, 4], np.int32)) == "query_start[0] is 1; expected 0"


def test_block_entries_outside_the_window_are_never_read(isa: str) -> None:
    case = Case([(500, 1)], *SHAPES["gpt-oss"], 128)
    assert (case.block[0, : 372 // 32] == -1).all()
    case.check(case.run())
