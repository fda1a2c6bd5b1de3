"""Bring the pages of a mapped file into memory before they are needed.

Pages that come in one fault at a time make a first token slow. A hint: where the system lacks it the
numbers stay right. Source: madvise(2).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: fault the pages in, all at once. Python's mmap has no name for it."""

_PIECE_BYTES = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def bring_in(array: npt.NDArray[Any]) -> None:
    """Map every page of a mapped array now, reading the file where it is not cached yet. Releases the GIL."""
    for start, size in _pieces(array):
        if not _advise(start, size, _POPULATE_READ):
            _touch(array)
            return


def _pieces(array: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """(address, bytes) of the pages that the array touches, in pieces: an interrupt need not wait long."""
    first = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    last = -(-(array.ctypes.data + array.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    return [(start, min(_PIECE_BYTES, last - start)) for start in range(first, last, _PIECE_BYTES)]


def _advise(start: int, size: int, option: int) -> bool:
    return _libc is not None and _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), option) == 0


def _touch(array: npt.NDArray[Any]) -> None:
    """One read a page, for systems that cannot populate."""
    bytes_ = array.reshape(-1).view(np.uint8)
    bytes_[:: mmap.PAGESIZE].max(initial=0)
