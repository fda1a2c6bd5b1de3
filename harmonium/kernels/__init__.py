"""The typed face of the native kernels: arrays in, arrays out. `reference` is their NumPy specification."""

import harmonium.kernels.interface  # noqa: F401  # first: it refuses another version's native module
from harmonium.kernels.matmul import (
    Int8Weight,
    linear_bf16,
    linear_int8,
    low_rank,
    matmul_mxfp4,
    matmul_scratch_bytes,
    moe_bf16,
    moe_mxfp4,
    moe_packed,
    pack_mxfp4,
    packed_shape,
    quantize_weight,
)
from harmonium.kernels.ops import (
    attention,
    attention_scratch_bytes,
    gather_rows,
    rms_norm,
    rope_and_store,
    router,
)
from harmonium.kernels.runtime import configure, current_isa, current_threads, supported_isa

__all__ = [
    "Int8Weight",
    "attention",
    "attention_scratch_bytes",
    "configure",
    "current_isa",
    "current_threads",
    "gather_rows",
    "linear_bf16",
    "linear_int8",
    "low_rank",
    "matmul_mxfp4",
    "matmul_scratch_bytes",
    "moe_bf16",
    "moe_mxfp4",
    "moe_packed",
    "pack_mxfp4",
    "packed_shape",
    "quantize_weight",
    "rms_norm",
    "rope_and_store",
    "router",
    "supported_isa",
]
