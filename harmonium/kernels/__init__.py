"""The typed face of the native kernels: arrays in, arrays out. `reference` is their specification in NumPy."""

from harmonium.kernels.ops import (
    attention,
    attention_scratch_bytes,
    gather_rows,
    rms_norm,
    rope_and_store,
    router,
)

__all__ = [
    "attention",
    "attention_scratch_bytes",
    "gather_rows",
    "rms_norm",
    "rope_and_store",
    "router",
]
