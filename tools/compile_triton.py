"""Compiles the Triton kernels to machine code for GPUs that need not be here, and says what each takes.

    python tools/compile_triton.py [80 90 100 120]

Sizes are gpt-oss-20b's. It shows that the kernels compile and use tensor cores, and nothing of their speed.
Needs harmonium[cuda] (a CPU build of PyTorch will do), and no TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import bfloat16

from harmonium.model import torch_triton_attention as attention
from harmonium.model import torch_triton_experts as experts
from harmonium.model import torch_triton_layer as layer

CAPABILITIES = (80, 90, 100, 120)

TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
"""PTX instructions of Ampere and later, Hopper, and data-center Blackwell."""

Kernel = tuple[Any, dict[str, str], dict[str, Any]]
"""(kernel, types of its arguments, constants)."""


def kernels() -> Iterator[Kernel]:
    bf16, f32, i32, u8 = "*bf16", "*fp32", "*i32", "*u8"
    heads = {"H": 64, "G": 8, "K": 64, "SIZE": 64}
    caches = {"query": bf16, "key_cache": bf16, "value_cache": bf16, "table": i32, "tiles": i32}
    parts = {"part": f32, "lse": f32}
    counts = dict.fromkeys(("num_tokens", "table_width", "piece_tokens"), "i32")
    for rows in (16, 64):
        types = {**caches, **parts, **counts, "scale": "fp32"}
        yield attention._attend_piece, types, {"WINDOW": 128, **heads, "ROWS": rows, "PRODUCT": bfloat16}
    types = {**parts, "sink": bf16, "mixed": bf16, "num_pieces": "i32", "num_rows": "i32"}
    yield attention._join_pieces, types, {"H": 64, "K": 64, "SIZE": 64}
    yield from layer_kernels()
    types = dict.fromkeys(("expert_id", "order", "found"), i32) | {"num_tiles": "i32"}
    yield experts._group_pairs, types, {"PAIRS": 32, "EXPERTS": 32, "Y": 32, "E": 32, "X": 64, "ROWS": 16}
    weights = {"x": bf16, "blocks": u8, "scales": u8, "bias": bf16}
    sizes = {"num_outputs": "i32", "num_blocks": "i32", "num_active": "i32", "limit": "fp32", "alpha": "fp32"}
    tiles = {"order": i32, "tile_expert": i32, "tile_start": i32, "tile_stop": i32}
    for is_first in (1, 0):
        out = bf16 if is_first else f32
        types = {**weights, "expert_id": i32, "weight": f32, "out": out, **sizes}
        vector = {"OUTPUTS": experts.VECTOR_OUTPUTS, "BLOCKS": experts.VECTOR_BLOCKS, "COMPILED": True}
        yield experts._multiply_vectors, types, {"IS_FIRST": is_first, **vector}
        for shape in experts.TILE_SHAPES:
            types = {**weights, **tiles, "weight": f32, "out": out, **sizes}
            tile = {"ROWS": shape.rows, "OUTPUTS": shape.outputs, "BLOCKS": shape.blocks}
            yield (
                experts._multiply_tiles,
                types,
                {"IS_FIRST": is_first, "PRODUCT": bfloat16, "COMPILED": True, **tile},
            )


def layer_kernels() -> Iterator[Kernel]:
    bf16, f32 = "*bf16", "*fp32"
    rows = {"hidden": bf16, "added": f32, "weight": bf16, "new": bf16, "normed": bf16, "eps": "fp32"}
    yield layer._add_norm, rows, {"D": 2880, "COUNT": 4, "SPLITS": True, "SIZE": 4096}
    heads = {"fused": bf16, "cos": f32, "sin": f32, "slots": "*i64", "query": bf16}
    heads |= {"key_cache": bf16, "value_cache": bf16}
    yield layer._rotate_and_store, heads, {"H": 64, "G": 8, "HALF": 32, "SIZE": 32}
    router = {"x": bf16, "weight": bf16, "bias": bf16, "expert_id": "*i32", "expert_weight": f32}
    sizes = {"D": 2880, "E": 32, "A": 4, "EXPERTS": 32, "ACTIVE": 4, "INPUTS": layer.ROUTER_INPUTS}
    yield layer._choose_experts, router, sizes


def compile_kernel(kernel: Kernel, capability: int) -> str:
    """A line of the table."""
    function, types, constants = kernel
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    # Tensors begin at multiples of 16 bytes, as PyTorch's do.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind[0] == "*"
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    cores = sum(compiled.asm["ptx"].count(name) for name in TENSOR_CORES)
    shown = " ".join(f"{name}={constants[name]}" for name in ("IS_FIRST", "ROWS") if name in constants)
    return (
        f"{function.__name__:<18} sm_{capability:<4} {shown:<18} {compiled.metadata.shared:>8,} bytes shared "
        f"{cores:>3} tensor-core instructions"
    )


def main(arguments: list[str]) -> int:
    print(f"Triton {triton.__version__}")
    for capability in map(int, arguments or CAPABILITIES):
        for kernel in kernels():
            print(compile_kernel(kernel, capability), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
