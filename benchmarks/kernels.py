"""How close does each matrix kernel come to what this machine can do?

    python benchmarks/kernels.py [experts] [dense] [--threads N] [--isa NAME] [--seconds S] [--json]

The limits (read bandwidth, int8 and bf16 operations) are measured in the same run, before and after every
row, and each row is given as a share of the mean of the two: on a shared machine the limits move. Shapes are
those of gpt-oss-20b. A row is the best of as many repeats as fit in --seconds (at least three).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from harmonium.config import probe_hardware
from harmonium.kernels import matmul, runtime, unembedding
from harmonium.kernels.matmul import Activations

WIDTH = 2880  # D and F of gpt-oss-20b
NUM_ACTIVE = 4
QKV_OUTPUTS, VOCABULARY = 5120, 201_088
LIMIT, ALPHA = 7.0, 1.702


@dataclass(frozen=True)
class Row:
    """One figure. unit: "GB/s" of weights read, or "GOP/s" (a multiply-add is two). share: of the limit."""

    name: str
    value: float
    unit: str
    share: float
    milliseconds: float


@dataclass(frozen=True)
class Case:
    """`run` reads `read_bytes` of weights and does `operations`; the one that binds is reported.

    activations: which operations bind.
    """

    name: str
    run: Callable[[], None]
    read_bytes: int
    operations: int
    is_bound_by_memory: bool
    activations: Activations = "int8"


class Limits:
    """Measures what the machine can do now, with the threads in use."""

    def __init__(self) -> None:
        self._data = matmul.allocate(256 << 20)
        self._data[:] = 1

    def read(self) -> float:
        """Bytes a second."""
        return matmul.measure_read_bandwidth(self._data, 8)

    def int8(self) -> float:
        """Operations a second."""
        return max(matmul.measure_int8_ops(1_000) for _ in range(40))

    def bf16(self) -> float:
        """The same with bf16 activations: half of int8's where both have an instruction of their own."""
        return max(matmul.measure_bf16_ops(1_000) for _ in range(40))


class Experts:
    """Random MXFP4 experts of the true size."""

    def __init__(self, num_experts: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.num_experts = num_experts
        self.gate_up = self._matrix(rng, 2 * WIDTH)
        self.down = self._matrix(rng, WIDTH)
        self.gate_up_bias = np.zeros((num_experts, 2 * WIDTH), np.uint16)
        self.down_bias = np.zeros((num_experts, WIDTH), np.uint16)
        self.bytes_per_expert = sum(a.nbytes for a in (*self.gate_up, *self.down)) // num_experts

        self._packed = [self._tiles(*part) for part in (self.gate_up, self.down)]

    def _tiles(self, blocks: matmul.U8, scales: matmul.U8) -> matmul.U8:
        tiles, size = matmul.packed_shape(blocks.shape[1], WIDTH)
        packed = matmul.allocate(self.num_experts * tiles * size).reshape(self.num_experts, tiles, size)
        for expert, own in enumerate(packed):
            matmul.pack_mxfp4(blocks[expert], scales[expert], own)
        return packed

    def _matrix(self, rng: np.random.Generator, rows: int) -> tuple[matmul.U8, matmul.U8]:
        shape = (self.num_experts, rows, WIDTH // 32)
        blocks = matmul.allocate(int(np.prod(shape)) * 16).reshape(*shape, 16)
        blocks[:] = rng.integers(0, 256, (*shape[1:], 16), np.uint8)
        return blocks, np.full(shape, 118, np.uint8)

    def add(self, x: matmul.F32, expert_id: matmul.Int32, out: matmul.F32, activations: Activations) -> None:
        weight = np.full(expert_id.shape, 0.25, np.float32)
        up, down = (*self.gate_up, self.gate_up_bias), (*self.down, self.down_bias)
        matmul.moe_mxfp4(x, expert_id, weight, *up, *down, out, LIMIT, ALPHA, activations)

    def add_packed(self, x: matmul.F32, expert_id: matmul.Int32, out: matmul.F32) -> None:
        """The same from packed tiles, int8 activations."""
        weight = np.full(expert_id.shape, 0.25, np.float32)
        up, down = self._packed
        matmul.moe_packed(
            x, expert_id, weight, up, self.gate_up_bias, down, self.down_bias, out, LIMIT, ALPHA
        )


def _normal(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def _expert_case(
    experts: Experts, num_tokens: int, kind: str, activations: Activations, packed: bool = False
) -> Case:
    """kind "decode": tokens that choose as differently as they can; "prefill": num_tokens for each expert."""
    if kind == "decode":
        step = num_tokens
        used = min(experts.num_experts, num_tokens * NUM_ACTIVE)
    else:
        used = 2 * NUM_ACTIVE
        step = num_tokens * used // NUM_ACTIVE
    x, out = _normal(step, WIDTH), np.zeros((step, WIDTH), np.float32)
    slots = np.arange(step * NUM_ACTIVE, dtype=np.int32).reshape(step, NUM_ACTIVE)
    calls = iter(range(1 << 30))

    def run() -> None:
        # Other experts at every call: nothing may come from the cache.
        first = next(calls) * used
        chosen = (slots % used + first) % experts.num_experts
        if packed:
            experts.add_packed(x, chosen, out)
        else:
            experts.add(x, chosen, out, activations)

    operations = 2 * step * NUM_ACTIVE * 3 * WIDTH * WIDTH
    name = f"experts {'packed' if packed else 'mxfp4'} x {activations}, {kind} {num_tokens}"
    return Case(name, run, used * experts.bytes_per_expert, operations, kind == "decode", activations)


def _dense_case(name: str, weight: matmul.Int8Weight, num_tokens: int) -> Case:
    x = _normal(num_tokens, weight.num_inputs)
    out = np.zeros((num_tokens, weight.num_outputs), np.float32)

    def run() -> None:
        matmul.linear_int8(x, weight, None, out)

    operations = 2 * num_tokens * weight.num_outputs * weight.num_inputs
    return Case(f"{name} int8, {num_tokens}", run, weight.nbytes, operations, False)


def _logits_case(weight: unembedding.SplitWeight, num_tokens: int) -> Case:
    x = _normal(num_tokens, weight.num_inputs)
    out = np.zeros((num_tokens, weight.num_outputs), np.float32)

    def run() -> None:
        unembedding.logits(x, weight, out)

    operations = 2 * num_tokens * weight.num_outputs * weight.num_inputs
    return Case(f"unembedding int8, {num_tokens}", run, weight.nbytes, operations, True)


def _bf16_case(name: str, weight: matmul.Bf16, num_tokens: int, is_bound_by_memory: bool) -> Case:
    x, out = _normal(num_tokens, weight.shape[1]), np.zeros((num_tokens, weight.shape[0]), np.float32)

    def run() -> None:
        matmul.linear_bf16(x, weight, None, out)

    operations = 2 * num_tokens * weight.size
    return Case(f"{name} bf16, {num_tokens}", run, weight.nbytes, operations, is_bound_by_memory, "bf16")


def expert_cases() -> Iterator[Case]:
    """Rows of the experts; their weights take 0.84 GB, in files' order and in packed tiles."""
    experts = Experts(32, seed=2)
    for count in (1, 2, 4, 8):
        yield _expert_case(experts, count, "decode", "int8")
    for count in (2, 4, 8, 16, 32, 64, 256):
        yield _expert_case(experts, count, "prefill", "int8")
    for kind, count in (("decode", 1), ("decode", 8), ("prefill", 16), ("prefill", 64), ("prefill", 256)):
        yield _expert_case(experts, count, kind, "int8", packed=True)
    for kind, count in (("decode", 1), ("decode", 8), ("decode", 16), ("prefill", 4), ("prefill", 16)):
        yield _expert_case(experts, count, kind, "bf16")
    for count in (64, 256):
        yield _expert_case(experts, count, "prefill", "bf16")


def dense_cases() -> Iterator[Case]:
    """Rows of the dense weights, which take 1.8 GB."""
    bits = matmul.allocate(VOCABULARY * WIDTH * 2).view(np.uint16).reshape(VOCABULARY, WIDTH)
    bits[:] = np.random.default_rng(3).integers(0x3C00, 0x3D00, WIDTH, np.uint16)

    def quantize() -> None:
        unembedding.quantize_unembedding(bits)

    yield Case("quantize unembedding", quantize, bits.nbytes, 0, True)
    split = unembedding.quantize_unembedding(bits)
    for count in (1, 2, 4, 8):
        yield _logits_case(split, count)
    yield _bf16_case("unembedding", bits, 1, True)
    qkv = matmul.quantize_weight(bits[:QKV_OUTPUTS])
    for count in (16, 64, 512):
        yield _dense_case("qkv", qkv, count)
    yield _bf16_case("qkv", bits[:QKV_OUTPUTS], 512, False)


GROUPS = {"experts": expert_cases, "dense": dense_cases}


def measure(case: Case, limits: Limits, seconds: float) -> Row:
    """Best time of the case, and its share of the limit around it."""
    operations = limits.int8 if case.activations == "int8" else limits.bf16
    limit = limits.read if case.is_bound_by_memory else operations
    before = limit()
    case.run()
    best, end, repeats = float("inf"), time.perf_counter() + seconds, 0
    while repeats < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        case.run()
        best = min(best, time.perf_counter() - begin)
        repeats += 1
    work = case.read_bytes if case.is_bound_by_memory else case.operations
    rate = work / best
    unit = "GB/s" if case.is_bound_by_memory else "GOP/s"
    return Row(case.name, rate / 1e9, unit, rate / ((before + limit()) / 2), best * 1e3)


def limit_rows(isa: str, threads: int) -> Iterator[Row]:
    """The machine's limits with 1 to `threads` threads; share is of the one with all threads."""
    limits = Limits()
    reads, int8, bf16 = [], [], []
    for count in range(1, threads + 1):
        runtime.configure(isa, count)
        reads.append(limits.read())
        int8.append(limits.int8())
        bf16.append(limits.bf16())
    rows = (
        ("read bandwidth", reads, "GB/s"),
        ("int8 operations", int8, "GOP/s"),
        ("bf16 operations", bf16, "GOP/s"),
    )
    for name, rates, unit in rows:
        for count, rate in enumerate(rates, 1):
            yield Row(f"limit: {name}, threads {count}", rate / 1e9, unit, rate / rates[-1], 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the matrix kernels against this machine's limits.")
    parser.add_argument("--threads", type=int, default=len(probe_hardware(()).cores))
    parser.add_argument("--isa", choices=runtime.supported_isa(), default=runtime.current_isa())
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{' and '.join(GROUPS)}; both by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    unknown = [group for group in arguments.groups if group not in GROUPS]
    if unknown:
        parser.error(f"unknown group {unknown[0]!r}; expected {' or '.join(GROUPS)}")

    def show(row: Row) -> None:
        if arguments.json:
            print(json.dumps(asdict(row) | {"isa": arguments.isa, "threads": arguments.threads}), flush=True)
        else:
            share = f"{row.share:5.0%} of the limit" if row.milliseconds else ""
            print(
                f"{row.name:36} {row.value:8.1f} {row.unit:6} {row.milliseconds:9.3f} ms {share}", flush=True
            )

    for row in limit_rows(arguments.isa, arguments.threads):
        show(row)
    runtime.configure(arguments.isa, arguments.threads)
    limits = Limits()
    for group in arguments.groups or GROUPS:
        for case in GROUPS[group]():
            show(measure(case, limits, arguments.seconds))


if __name__ == "__main__":
    main()
