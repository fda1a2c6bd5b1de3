"""Which instruction set and how many threads the native kernels use: state of the process, set at start."""

from __future__ import annotations

from collections.abc import Sequence

from harmonium import _native


def supported_isa() -> tuple[str, ...]:
    """Instruction sets whose kernels this processor can run, slowest first."""
    return tuple(_native.supported_isa())


def current_isa() -> str:
    """The instruction set in use."""
    return str(_native.get_isa())


def current_threads() -> int:
    """Threads that share a kernel, the caller's included."""
    return int(_native.get_num_threads())


def configure(isa: str, threads: int, cores: Sequence[int] = ()) -> None:
    """Use these kernels and threads from now on, in the whole process. To change threads, no kernel may run.

    cores: where the workers run, when there are at least as many cores as threads; empty: anywhere.
    Raises ValueError for an instruction set that this processor lacks, or a count outside 1 to 256.
    """
    _native.set_isa(isa)
    _native.set_num_threads(threads, list(cores))
