"""Ranges of files -> memory, by threads, past the system's page cache.

A model larger than memory would push everything else out of the page cache and never find there what it
needs next, so files are opened with O_DIRECT; where a file system refuses that (tmpfs), pages are given back
after each read. Requests come in two classes: what a step waits for, and what it will probably want.

Source: open(2) and posix_fadvise(2) of the Linux man-pages; which sizes and how many at a time pay:
benchmarks/disk.py.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harmonium.errors import CheckpointError
from harmonium.model.streaming_memory import ALIGNMENT

CHUNK_BYTES = 4 << 20
"""Most bytes of one read, so that several threads share an expert and a cancelled one costs little."""

NUM_READERS = 6
"""Reads under way at a time."""

NUM_AHEAD = 2
"""Of them, those of what is only probable: what is needed then has to wait for so many at most."""


@dataclass(frozen=True, slots=True)
class Range:
    """nbytes of a file from `offset` on, wanted at memory[at]; at and offset agree modulo ALIGNMENT.

    Whole aligned blocks are read: memory up to ALIGNMENT - 1 bytes before and behind is overwritten.
    """

    file: Path
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """An aligned read. needed: bytes that must come; what lies behind may be missing at the file's end."""

    file: Path
    offset: int
    nbytes: int
    needed: int
    at: int


class Ticket:
    """Some ranges that are read together. Its fields belong to the DirectReader."""

    __slots__ = ("_chunks", "_num_running", "error")

    def __init__(self, chunks: Iterable[_Chunk]) -> None:
        self._chunks = deque(chunks)
        self._num_running = 0
        self.error: CheckpointError | None = None

    @property
    def is_over(self) -> bool:
        """Nothing of it is read any more: it is all there, or has failed, or was cancelled."""
        return not self._chunks and not self._num_running


class DirectReader:
    """Threads that read ranges to one piece of memory. Methods may be called from one other thread."""

    def __init__(
        self,
        files: Iterable[Path],
        memory: npt.NDArray[np.uint8],
        num_threads: int = NUM_READERS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """memory: begins at a multiple of ALIGNMENT. Raises CheckpointError when a file cannot be opened."""
        assert memory.ctypes.data % ALIGNMENT == 0 and chunk_bytes % ALIGNMENT == 0
        self._memory = memory.data
        self._chunk_bytes = chunk_bytes
        self._changed = threading.Condition()
        self._urgent: deque[Ticket] = deque()
        self._ahead: deque[Ticket] = deque()
        self._num_ahead = 0
        self._is_closed = False
        self.bytes_read = 0
        self._files: dict[Path, tuple[int, bool]] = {}
        try:
            for file in files:
                self._files[file] = _open(file)
        except BaseException:
            self._close_files()
            raise
        # Daemons: an interpreter that ends without close() does not wait for the disk.
        self._threads = [
            threading.Thread(target=self._work, name=f"harmonium-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(is_direct for _, is_direct in self._files.values())

    def submit(self, ranges: Iterable[Range], urgent: bool) -> Ticket:
        """Queue a read. Urgent ones come first; of a class the earlier."""
        ticket = Ticket(chunk for item in ranges for chunk in _chunks(item, self._chunk_bytes))
        with self._changed:
            (self._urgent if urgent else self._ahead).append(ticket)
            self._changed.notify_all()
        return ticket

    def hurry(self, ticket: Ticket) -> None:
        """What was probable is needed now: it comes before what is only probable."""
        with self._changed:
            if ticket in self._ahead:
                self._ahead.remove(ticket)
                self._urgent.append(ticket)
                self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Read no more of it. Its memory is free once it is over; the reads under way go on till then."""
        with self._changed:
            self._drop_rest(ticket)

    def _drop_rest(self, ticket: Ticket) -> None:
        """With the lock held."""
        ticket._chunks.clear()
        for queue in (self._urgent, self._ahead):
            if ticket in queue:
                queue.remove(ticket)

    def wait_any(self, tickets: Iterable[Ticket]) -> None:
        """Return when one of them is over. Raises CheckpointError when the reader is closed meanwhile."""
        listed = list(tickets)
        with self._changed:
            while not any(ticket.is_over for ticket in listed):
                if self._is_closed:
                    raise CheckpointError("the checkpoint's files were closed while experts were read")
                self._changed.wait()

    def close(self) -> None:
        """End the threads after the reads under way, and close the files. A second call does nothing."""
        with self._changed:
            self._is_closed = True
            for ticket in (*self._urgent, *self._ahead):
                ticket._chunks.clear()
            self._urgent.clear()
            self._ahead.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._close_files()
        self._memory = memoryview(b"")

    def _close_files(self) -> None:
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _take(self) -> tuple[Ticket, _Chunk, bool] | None:
        """The next read, waited for, and whether it is only probable; None when closed."""
        with self._changed:
            while not (self._urgent or (self._ahead and self._num_ahead < NUM_AHEAD)):
                if self._is_closed:
                    return None
                self._changed.wait()
            is_ahead = not self._urgent
            queue = self._ahead if is_ahead else self._urgent
            ticket = queue[0]
            ticket._num_running += 1  # first: `is_over` is looked at without the lock
            chunk = ticket._chunks.popleft()
            if not ticket._chunks:
                queue.popleft()
            self._num_ahead += is_ahead
            return ticket, chunk, is_ahead

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            ticket, chunk, is_ahead = taken
            error = None
            try:
                self._read(chunk)
            except CheckpointError as failure:
                error = failure
            except Exception as failure:  # whatever it is: nobody may wait for a thread that is gone
                error = CheckpointError(f"{chunk.file}: cannot be read at byte {chunk.offset:,} ({failure})")
            with self._changed:
                self._num_ahead -= is_ahead
                if error is None:
                    self.bytes_read += chunk.nbytes
                else:
                    ticket.error = ticket.error or error
                    self._drop_rest(ticket)
                ticket._num_running -= 1  # last: who sees that it is over must see the error
                if ticket.is_over:
                    self._changed.notify_all()

    def _read(self, chunk: _Chunk) -> None:
        """Raises OSError, CheckpointError when the file has become shorter."""
        descriptor, is_direct = self._files[chunk.file]
        done = 0
        while done < chunk.needed:
            target = self._memory[chunk.at + done : chunk.at + chunk.nbytes]
            count = os.preadv(descriptor, [target], chunk.offset + done)
            done += count
            # A direct read that ends between two blocks has met the end of the file: nothing follows.
            if done < chunk.needed and (count == 0 or (is_direct and done % ALIGNMENT)):
                raise CheckpointError(
                    f"{chunk.file}: has been shortened to {os.fstat(descriptor).st_size:,} bytes while it "
                    f"was in use; {chunk.offset + chunk.needed:,} are needed"
                )
        if not is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, chunk.offset, chunk.nbytes, os.POSIX_FADV_DONTNEED)


def aligned(memory: npt.NDArray[np.uint8], nbytes: int) -> npt.NDArray[np.uint8]:
    """nbytes of memory from its first multiple of ALIGNMENT on; it must have ALIGNMENT - 1 bytes more."""
    start = -memory.ctypes.data % ALIGNMENT
    assert start + nbytes <= memory.nbytes, "memory is too small to be aligned"
    return memory[start : start + nbytes]


def _open(file: Path) -> tuple[int, bool]:
    """(descriptor, whether it reads past the page cache). Raises CheckpointError."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        if direct:
            try:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | direct)
                if _reads_directly(descriptor):
                    return descriptor, True
                os.close(descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC), False
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened for reading experts ({error})") from None


def _reads_directly(descriptor: int) -> bool:
    """Some file systems take O_DIRECT and refuse the reads."""
    with mmap.mmap(-1, ALIGNMENT) as page:
        try:
            os.preadv(descriptor, [page], 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
    return True


def _chunks(item: Range, chunk_bytes: int) -> Iterable[_Chunk]:
    before = item.offset % ALIGNMENT
    assert item.at % ALIGNMENT == before, "a range must keep its place within a block"
    first, end = item.offset - before, item.offset + item.nbytes
    for offset in range(first, end, chunk_bytes):
        needed = min(chunk_bytes, end - offset)
        nbytes = -(-needed // ALIGNMENT) * ALIGNMENT
        yield _Chunk(item.file, offset, nbytes, needed, item.at - before + offset - first)
