"""Matrix products of the model: dense weights in int8 or bf16, experts in MXFP4 or bf16.

All arrays are C-contiguous and are checked; a wrong one raises ValueError with the argument's name, what it
has and what was expected. x and out are float32; biases are bf16 bits (uint16) or, for the dense products,
None. The number of inputs is a multiple of 32; outputs, tokens, experts and active experts may be any number.
A row's result does not depend on the number of threads, nor on the other rows of x: on one instruction set it
is the same to the bit. NaN or infinity in a row of x gives NaN in that row of out.

Every function may raise MemoryError. What each computes: kernels/reference_matmul.py; layouts:
docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from harmonium import _native

F32 = npt.NDArray[np.float32]
Bf16 = npt.NDArray[np.uint16]
U8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]

Activations = Literal["int8", "bf16"]
"""How activations enter a product. int8: a scale per 32 inputs. bf16: rounded to nearest even."""

PANEL_ROWS = 16
TILE_ROWS = 32

Pair = tuple[npt.NDArray[Any], npt.NDArray[Any], float]
"""(a, b, scale) of a low-rank product scale * (x @ a.T) @ b: float32, or bf16 bits in both. For the experts
a is [E, R, inputs] and b [E, R, outputs], R the rank."""

ExpertAdapter = tuple[Pair | None, Pair | None]
"""What an adapter adds to gate_up and to down of a layer's experts."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A dense weight [num_outputs, num_inputs] as int8 panels (docs/kernels.md): see `quantize_weight`."""

    panels: U8
    num_outputs: int
    num_inputs: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.panels.nbytes


def allocate(size_bytes: int) -> U8:
    """Return uint8 memory, aligned and on huge pages where the system gives them; contents are undefined."""
    memory: U8 = _native.allocate(size_bytes)
    return memory


def quantize_weight(weight_NK: Bf16) -> Int8Weight:
    """Return the weight in int8 with a bf16 scale per 32 inputs, in new memory; weight_NK is read once."""
    if weight_NK.ndim != 2 or weight_NK.shape[1] % 32 != 0 or weight_NK.shape[1] == 0:
        raise ValueError(f"weight has shape {weight_NK.shape}; expected [N, K] with K a multiple of 32")
    weight = empty_panels(*weight_NK.shape)
    _native.quantize_weight(weight_NK, weight.panels)
    return weight


def empty_panels(num_outputs: int, num_inputs: int) -> Int8Weight:
    """Return memory for a weight of that size; its contents are undefined."""
    num_panels = -(-num_outputs // PANEL_ROWS)
    panel_bytes = int(_native.panel_bytes(num_inputs))
    panels = allocate(num_panels * panel_bytes).reshape(num_panels, panel_bytes)
    return Int8Weight(panels, num_outputs, num_inputs)


def linear_int8(x_TK: F32, weight: Int8Weight, bias_N: Bf16 | None, out_TN: F32, add: bool = False) -> None:
    """Write x @ weight.T + bias to out, or add it (add); x is quantized to int8 inside."""
    _native.linear_int8(x_TK, weight.panels, weight.num_outputs, bias_N, out_TN, add)


def linear_bf16(x_TK: F32, weight_NK: Bf16, bias_N: Bf16 | None, out_TN: F32, add: bool = False) -> None:
    """Write x @ weight.T + bias to out, or add it (add); x is rounded to bf16, sums are float32."""
    _native.linear_bf16(x_TK, weight_NK, bias_N, out_TN, add)


def matmul_mxfp4(
    x_TK: F32,
    blocks_NK: U8,
    scales_NB: U8,
    bias_N: Bf16 | None,
    out_TN: F32,
    activations: Activations = "int8",
) -> None:
    """Write x @ weight.T + bias to out for one MXFP4 matrix: blocks [N, K/32, 16], scales [N, K/32]."""
    _native.matmul_mxfp4(x_TK, blocks_NK, scales_NB, bias_N, out_TN, activations)


def low_rank(
    x_TK: F32,
    row_X: Int32,
    a_RK: npt.NDArray[Any],
    b_RN: npt.NDArray[Any],
    scale: float,
    out_TM: F32,
    column: int = 0,
) -> None:
    """Add scale * (x @ a.T) @ b to columns column ... column + N - 1 of out, for the rows row_X of x and out.

    row_X: ascending, each once. a and b are both float32, or both bf16 bits; sums are float32.
    """
    _native.low_rank(x_TK, row_X, a_RK, b_RN, scale, out_TM, column)


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
    """Add to out the weighted sum of each token's experts: gate_up, clamped SwiGLU, down.

    gate_up [E, 2F, D/32, 16] with gate and up rows in turn, down [E, D, F/32, 16]; scales without the last
    axis; biases [E, 2F] and [E, D]. adapters: what LoRA adapters add to both products (for gate_up before
    the SwiGLU), from float32 inputs; adapter_T: which of them is a token's, -1: none. Raises IndexError for
    an expert id outside 0 to E - 1.
    """
    _native.moe_mxfp4(
        x_TD,
        expert_id_TA,
        expert_weight_TA,
        gate_up_blocks,
        gate_up_scales,
        gate_up_bias,
        down_blocks,
        down_scales,
        down_bias,
        out_TD,
        limit,
        alpha,
        activations,
        adapters,
        adapter_T,
    )


def packed_shape(num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Shape of an MXFP4 matrix in packed tiles of 32 outputs (docs/kernels.md): tiles, bytes of each."""
    return -(-num_outputs // TILE_ROWS), int(_native.packed_bytes(num_inputs))


def pack_mxfp4(blocks_NK: U8, scales_NB: U8, packed: U8) -> None:
    """Write an MXFP4 matrix (blocks [N, K/32, 16], scales [N, K/32]) to packed tiles, `packed_shape` of them.

    Runs on the calling thread alone, without the interpreter's lock.
    """
    _native.pack_mxfp4(blocks_NK, scales_NB, packed)


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
    """Add to out what `moe_mxfp4` adds with int8 activations, to the bit, from tiles [E, tiles, bytes]."""
    _native.moe_packed(
        x_TD,
        expert_id_TA,
        expert_weight_TA,
        gate_up_packed,
        gate_up_bias,
        down_packed,
        down_bias,
        out_TD,
        limit,
        alpha,
        adapters,
        adapter_T,
    )


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
    """Add to out what `moe_mxfp4` adds, for bf16 experts as Hugging Face lays them out.

    gate_up_weight [E, D, 2F] (gate and up columns in turn), down_weight [E, F, D].
    Raises IndexError for an expert id outside 0 to E - 1.
    """
    _native.moe_bf16(
        x_TD,
        expert_id_TA,
        expert_weight_TA,
        gate_up_weight,
        gate_up_bias,
        down_weight,
        down_bias,
        out_TD,
        limit,
        alpha,
        adapters,
        adapter_T,
    )


def matmul_scratch_bytes(
    num_tokens: int,
    hidden_size: int,
    expert_size: int,
    num_active: int,
    max_inputs: int,
    threads: int,
) -> int:
    """Return the bytes that the matrix kernels keep between calls when a step has num_tokens tokens.

    max_inputs: the most inputs of a dense weight. Shared scratch is the most that one call takes; each thread
    has a decoded panel and a tile besides.
    """
    shared = max(
        int(_native.moe_scratch_bytes(num_tokens, hidden_size, expert_size, num_active)),
        int(_native.linear_scratch_bytes(num_tokens, max_inputs)),
    )
    return shared + threads * int(_native.matmul_thread_bytes(max(max_inputs, hidden_size, expert_size)))


def measure_read_bandwidth(data: U8, repeats: int = 5) -> float:
    """Return how fast the threads in use read `data` together, in bytes a second, best of `repeats`."""
    return float(_native.measure_read_bandwidth(data, repeats))


def measure_int8_ops(rounds: int = 100_000) -> float:
    """Return int8 multiplications and additions a second of the threads in use, with nothing else to do."""
    return float(_native.measure_int8_ops(rounds))


def measure_bf16_ops(rounds: int = 100_000) -> float:
    """The same of products with bf16 activations: `vdpbf16ps` where the processor has it, else float32."""
    return float(_native.measure_bf16_ops(rounds))
