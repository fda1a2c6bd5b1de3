"""Reads through io_uring, by system calls alone: enough of it to measure. x86-64 and arm64 Linux.

Source: io_uring_setup(2), io_uring_enter(2), and the layout of the rings in Linux' uapi/linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

_SETUP, _ENTER = 425, 426
_OFF_SQ_RING, _OFF_CQ_RING, _OFF_SQES = 0, 0x8000000, 0x10000000
_GETEVENTS = 1
_OP_READ = 22
_SQE_BYTES, _CQE_BYTES = 64, 16

_libc = ctypes.CDLL(None, use_errno=True)


class Ring:
    """A ring for `depth` reads at a time. Raises OSError where the system has none."""

    def __init__(self, depth: int) -> None:
        parameters = ctypes.create_string_buffer(120)
        self._descriptor = _libc.syscall(_SETUP, depth, parameters)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup failed")
        words = struct.unpack("<30I", parameters.raw)
        sq_entries, cq_entries = words[0], words[1]
        self._sq, self._cq = words[10:20], words[20:30]
        sq_bytes = self._sq[6] + 4 * sq_entries
        cq_bytes = self._cq[5] + _CQE_BYTES * cq_entries
        self._sq_ring = mmap.mmap(self._descriptor, sq_bytes, offset=_OFF_SQ_RING)
        self._cq_ring = mmap.mmap(self._descriptor, cq_bytes, offset=_OFF_CQ_RING)
        self._sqes = mmap.mmap(self._descriptor, _SQE_BYTES * sq_entries, offset=_OFF_SQES)

    def submit(self, descriptor: int, address: int, nbytes: int, offset: int, tag: int) -> None:
        """Begin one read of the file to memory at an address."""
        tail_at, mask = self._sq[1], self._word(self._sq_ring, self._sq[2])
        tail = self._word(self._sq_ring, tail_at)
        index = tail & mask
        entry = struct.pack("<BBHiQQIIQ", _OP_READ, 0, 0, descriptor, offset, address, nbytes, 0, tag)
        self._sqes[index * _SQE_BYTES : (index + 1) * _SQE_BYTES] = entry.ljust(_SQE_BYTES, b"\0")
        self._set(self._sq_ring, self._sq[6] + 4 * index, index)
        self._set(self._sq_ring, tail_at, tail + 1)
        self._enter(1, 0)

    def completed(self) -> Iterator[tuple[int, int]]:
        """(tag, bytes or minus an error number) of the reads that are over; waits for one."""
        self._enter(0, 1)
        head_at, mask = self._cq[0], self._word(self._cq_ring, self._cq[2])
        head, tail = self._word(self._cq_ring, head_at), self._word(self._cq_ring, self._cq[1])
        while head != tail:
            tag, result = struct.unpack_from("<Qi", self._cq_ring, self._cq[5] + _CQE_BYTES * (head & mask))
            head = (head + 1) & 0xFFFFFFFF
            self._set(self._cq_ring, head_at, head)
            yield tag, result

    def close(self) -> None:
        for ring in (self._sq_ring, self._cq_ring, self._sqes):
            ring.close()
        os.close(self._descriptor)

    def _enter(self, to_submit: int, least: int) -> None:
        count = _libc.syscall(_ENTER, self._descriptor, to_submit, least, _GETEVENTS if least else 0, None, 0)
        if count < 0:
            raise OSError(ctypes.get_errno(), "io_uring_enter failed")

    @staticmethod
    def _word(ring: mmap.mmap, at: int) -> int:
        return int(struct.unpack_from("<I", ring, at)[0])

    @staticmethod
    def _set(ring: mmap.mmap, at: int, value: int) -> None:
        struct.pack_into("<I", ring, at, value & 0xFFFFFFFF)
