"""Bring the pages of a mapped file into memory before they are needed.

Pages that come in one fault at a time make a first token slow. A hint: where the system lacks it the
numbers stay right. Source: madvise(2).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

_RANDOM = 1
"""MADV_RANDOM: a fault reads its own page and none that follow."""

_WILLNEED = 3
"""MADV_WILLNEED: read into the system's cache, without mapping."""

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: fault the pages in, all at once. Python's mmap has no name for it."""

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE: the same for writing, and what is there stays."""

_PIECE_BYTES = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Reader:
    """Brings mapped arrays in, one after the other, on a thread of its own: steps may run meanwhile.

    A step that needs a page which has not come yet reads it itself, so an answer can start before a cold file
    is read whole. The arrays must stay mapped until `close` or `wait` has returned.

    arrays: read in this order, and mapped. packers: called after them, in order; each reads what it copies
    and ends early when its event is set. gathered: a table of which steps take single rows; its file is read
    last, into the system's cache alone, and a row that is not there costs its own pages and not the megabytes
    of a read-ahead.
    """

    def __init__(
        self,
        arrays: Iterable[npt.NDArray[Any]],
        gathered: npt.NDArray[Any] | None = None,
        packers: Iterable[Callable[[threading.Event], None]] = (),
    ) -> None:
        self._arrays = list(arrays)
        self._packers = list(packers)
        self._gathered = gathered
        if gathered is not None:
            for start, size in _pieces(gathered):
                _advise(start, size, _RANDOM)
        self._stop = threading.Event()
        # A daemon: an interpreter that ends without close() does not wait for the disk.
        self._thread = threading.Thread(target=self._read, name="harmonium-pages", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for array in self._arrays:
            bring_in(array, self._stop)
            if self._stop.is_set():
                return
        for pack in self._packers:
            pack(self._stop)
            if self._stop.is_set():
                return
        if self._gathered is not None:
            for start, size in _pieces(self._gathered):
                if self._stop.is_set() or not _advise(start, size, _WILLNEED):
                    return

    def wait(self) -> None:
        """Return when every array is there."""
        self._thread.join()

    def close(self) -> None:
        """Stop after the piece that is being read. A second call does nothing."""
        self._stop.set()
        self._thread.join()
        self._arrays.clear()
        self._packers.clear()
        self._gathered = None


def bring_in(array: npt.NDArray[Any], stop: threading.Event | None = None) -> None:
    """Map every page of a mapped array now, reading the file where it is not cached yet. Releases the GIL.

    stop: set by another thread, ends it after the piece at hand.
    """
    for start, size in _pieces(array):
        if stop is not None and stop.is_set():
            return
        if not _advise(start, size, _POPULATE_READ):
            _touch(array)
            return


def take(memory: npt.NDArray[Any], stop: threading.Event) -> None:
    """Have the system give the pages of memory that was allocated, piece by piece until `stop` is set.

    What is written meanwhile stays. A hint: where it is not known, pages come when they are written first.
    """
    for start, size in _pieces(memory):
        if stop.is_set() or not _advise(start, size, _POPULATE_WRITE):
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
