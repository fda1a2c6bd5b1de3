"""How much of the read bandwidth do products of few tokens reach?

    python benchmarks/few_tokens.py [--threads 2] [--tokens 1,4,8,16] [--rounds 20]

A 20b's shapes with weights larger than any cache. Bandwidth is measured just before and after each call, for
it drifts: a row is the median over the rounds of bytes of weights a second over that bandwidth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from harmonium.kernels import matmul, runtime, unembedding
from harmonium.kernels.sampling import DrawSettings, sample
from harmonium.kernels.unembedding import MAX_SCREENED_ROWS, SplitWeight, Wish

HIDDEN = 2880
VOCABULARY = 201_088
NUM_EXPERTS = 32
NUM_ACTIVE = 4
NUM_LAYERS = 3  # 1.2 GB of experts

Run = Callable[[int, np.random.Generator], tuple[int, float]]
"""(tokens, random numbers) to (bytes of weights that were read, seconds)."""


def experts() -> Run:
    """Nine calls of packed experts; tokens choose at random."""

    def packed(num_outputs: int) -> np.ndarray:
        tiles, size = matmul.packed_shape(num_outputs, HIDDEN)
        weights = matmul.allocate(NUM_EXPERTS * tiles * size).reshape(NUM_EXPERTS, tiles, size)
        weights[...] = 120  # as bits of a scale: moderate, and no denormal slows a sum
        return weights

    layers = [(packed(2 * HIDDEN), packed(HIDDEN)) for _ in range(NUM_LAYERS)]
    gate_up_bias = np.zeros((NUM_EXPERTS, 2 * HIDDEN), np.uint16)
    down_bias = np.zeros((NUM_EXPERTS, HIDDEN), np.uint16)

    def run(num_tokens: int, rng: np.random.Generator) -> tuple[int, float]:
        x = rng.standard_normal((num_tokens, HIDDEN)).astype(np.float32)
        out = np.zeros_like(x)
        weight = np.full((num_tokens, NUM_ACTIVE), 0.25, np.float32)
        num_bytes, seconds = 0, 0.0
        for call in range(3 * NUM_LAYERS):
            gate_up, down = layers[call % NUM_LAYERS]
            chosen = [np.sort(rng.permutation(NUM_EXPERTS)[:NUM_ACTIVE]) for _ in range(num_tokens)]
            ids = np.stack(chosen).astype(np.int32)
            start = time.perf_counter()
            routes = x, ids, weight
            matmul.moe_packed(*routes, gate_up, gate_up_bias, down, down_bias, out, 7.0, 1.702)
            seconds += time.perf_counter() - start
            num_bytes += np.unique(ids).size * (gate_up[0].nbytes + down[0].nbytes)
        return num_bytes, seconds

    return run


def unembedding_weight() -> SplitWeight:
    values = np.random.default_rng(0).standard_normal((VOCABULARY, HIDDEN), dtype=np.float32)
    return unembedding.quantize_unembedding((values.view(np.uint32) >> 16).astype(np.uint16))


def logits(weight: SplitWeight, wish_of: Callable[[int], Wish] | None) -> Run:
    """The unembedding and the sampler: whole rows, or what rows need whose wish depends on a key.

    Where halves are left out, the high ones alone are counted.
    """

    def run(num_tokens: int, rng: np.random.Generator) -> tuple[int, float]:
        # Logits of deviation 4: the best of a row has a probability of 0.15 or so.
        x = rng.standard_normal((num_tokens, HIDDEN)).astype(np.float32) * np.float32(4 / HIDDEN**0.5)
        out = np.zeros((num_tokens, VOCABULARY), np.float32)
        keys = rng.integers(0, 1 << 62, num_tokens).tolist()
        wishes = [Wish(key=key, temperature=1.0) if wish_of is None else wish_of(key) for key in keys]
        draws = [(row, DrawSettings(wish.key, wish.temperature)) for row, wish in enumerate(wishes)]
        is_screened = wish_of is not None and num_tokens <= MAX_SCREENED_ROWS
        start = time.perf_counter()
        if is_screened:
            unembedding.screened_logits(x, weight, wishes, out)
        else:
            unembedding.logits(x, weight, out)
        sample(out, draws)
        seconds = time.perf_counter() - start
        return weight.nbytes - is_screened * VOCABULARY * HIDDEN // 2, seconds

    return run


def dense(num_outputs: int, num_inputs: int, count: int) -> Run:
    """One call for each of `count` int8 matrices."""
    rng = np.random.default_rng(0)

    def matrix() -> matmul.Int8Weight:
        values = rng.standard_normal((num_outputs, num_inputs), dtype=np.float32)
        return matmul.quantize_weight((values.view(np.uint32) >> 16).astype(np.uint16))

    weights = [matrix() for _ in range(count)]

    def run(num_tokens: int, rng: np.random.Generator) -> tuple[int, float]:
        x = rng.standard_normal((num_tokens, num_inputs)).astype(np.float32)
        out = np.zeros((num_tokens, num_outputs), np.float32)
        start = time.perf_counter()
        for weight in weights:
            matmul.linear_int8(x, weight, None, out)
        return sum(weight.nbytes for weight in weights), time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,4,8,16", help="(1,4,8,16)")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    runtime.configure(runtime.supported_isa()[-1], arguments.threads)
    shared = matmul.allocate(1 << 29)
    shared[...] = 1
    weight = unembedding_weight()
    runs = {
        "experts packed": experts(),
        "qkv int8": dense(5120, HIDDEN, 24),
        "out int8": dense(HIDDEN, 4096, 24),
        "unembedding, whole": logits(weight, None),
        "greedy": logits(weight, lambda key: Wish(1)),
        "at temperature 1": logits(weight, lambda key: Wish(key=key, temperature=1.0)),
    }
    rng = np.random.default_rng(0)
    for num_tokens in map(int, arguments.tokens.split(",")):
        shares: dict[str, list[float]] = {name: [] for name in runs}
        bandwidths = []
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                before = matmul.measure_read_bandwidth(shared, 1)
                num_bytes, seconds = run(num_tokens, rng)
                after = matmul.measure_read_bandwidth(shared, 1)
                shares[name].append(num_bytes / seconds / ((before + after) / 2))
                bandwidths.append(before)
        listed = ", ".join(f"{name} {median(found):.0%}" for name, found in shares.items())
        print(f"{num_tokens} tokens at {median(bandwidths) / 1e9:.0f} GB/s: {listed}", flush=True)


if __name__ == "__main__":
    main()
