"""Calls of kernels that are recorded once and run many times, without Python between them: native/program.h.

    program = Program()
    with program.recording():
        rms_norm(x, weight, eps, out)   # noted, not done
    program.run()                       # done, with what the arrays hold now

Recorded are, on the thread that records, `rms_norm`, `rope_and_store`, `attention` and `router` of
kernels/ops.py, the dense products and `moe_mxfp4`, `moe_packed`, `moe_bf16` and `moe_ggml`. Shapes and types
are checked when they are recorded, slots, blocks and lengths at every run. Short vectors in bf16 are read
when they are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harmonium import _native


class Program:
    """Keeps pointers alone: whoever records keeps the arrays."""

    def __init__(self) -> None:
        self._calls = _native.Program()

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """This thread's calls are noted and not done. Raises ValueError where it records already."""
        self._calls.begin()
        try:
            yield
        finally:
            self._calls.end()

    def run(self) -> None:
        """Do all that was recorded, in order. Raises what the calls raise, ValueError while recording."""
        self._calls.run()
