"""Ranges of files come whole, in the order of need, and a failure is told."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.errors import CheckpointError
from harmonium.kernels.matmul import allocate
from harmonium.model.direct_reads import DirectReader, Range, Ticket, aligned
from harmonium.model.streaming_memory import ALIGNMENT
from tests.engine.serving import wait_until

SIZE_BYTES = 5 * ALIGNMENT + 777
BYTES = np.random.default_rng(0).integers(0, 256, SIZE_BYTES, np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experts"
    path.write_bytes(BYTES.tobytes())
    return path


class Reading:
    """A reader with one thread, and its memory."""

    def __init__(self, file: Path, **settings: int) -> None:
        self.file = file
        self.memory = aligned(allocate(65 * ALIGNMENT), 64 * ALIGNMENT)
        self.memory[:] = 0xEE
        settings = {"num_threads": 1, "chunk_bytes": ALIGNMENT, **settings}
        self.reader = DirectReader([file], self.memory, **settings)

    def submit(self, offset: int, nbytes: int, block: int = 0, urgent: bool = True) -> Ticket:
        at = block * ALIGNMENT + offset % ALIGNMENT
        return self.reader.submit([Range(self.file, offset, nbytes, at)], urgent)

    def finish(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            self.reader.wait_any([ticket])

    def found(self, offset: int, nbytes: int, block: int = 0) -> npt.NDArray[np.uint8]:
        at = block * ALIGNMENT + offset % ALIGNMENT
        return self.memory[at : at + nbytes]


@pytest.fixture
def reading(file: Path) -> Iterator[Reading]:
    made = Reading(file)
    yield made
    made.reader.close()


class Gate:
    """Holds reads back until it is opened, and lists their offsets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offsets: list[int] = []
        self.began = threading.Event()
        self.open = threading.Event()
        real = os.preadv

        def preadv(descriptor: int, buffers: Any, offset: int) -> int:
            self.offsets.append(offset)
            self.began.set()
            assert self.open.wait(30)
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_every_range_comes_whole_and_touches_only_its_blocks(
    file: Path, chunk: int, num_threads: int
) -> None:
    for offset, nbytes in ((0, 1), (1, ALIGNMENT), (4095, 2), (8192, 12288), (777, SIZE_BYTES - 777)):
        reading = Reading(file, num_threads=num_threads, chunk_bytes=chunk * ALIGNMENT)
        ticket = reading.submit(offset, nbytes, block=3)
        reading.finish(ticket)
        reading.reader.close()
        assert ticket.error is None
        np.testing.assert_array_equal(reading.found(offset, nbytes, 3), BYTES[offset : offset + nbytes])
        last = 3 * ALIGNMENT + -(-(offset % ALIGNMENT + nbytes) // ALIGNMENT) * ALIGNMENT
        assert (reading.memory[: 3 * ALIGNMENT] == 0xEE).all() and (reading.memory[last:] == 0xEE).all()


def test_what_is_needed_overtakes_what_is_probable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(file)
    gate = Gate(monkeypatch)
    first = reading.submit(0, 10)
    assert gate.began.wait(30)
    probable = reading.submit(ALIGNMENT, 10, 1, urgent=False)
    hurried = reading.submit(2 * ALIGNMENT, 10, 2, urgent=False)
    needed = reading.submit(3 * ALIGNMENT, 10, 3)
    reading.reader.hurry(hurried)
    gate.open.set()
    reading.finish(first, probable, hurried, needed)
    reading.reader.close()
    assert [offset // ALIGNMENT for offset in gate.offsets] == [0, 3, 2, 1]


def test_what_is_hurried_is_read_by_every_thread(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only probable has two readers; the others must wake when it turns out to be needed."""
    reading = Reading(file, num_threads=5)
    gate = Gate(monkeypatch)
    ticket = reading.submit(0, 5 * ALIGNMENT, urgent=False)
    wait_until(lambda: len(gate.offsets) == 2)
    reading.reader.hurry(ticket)
    wait_until(lambda: len(gate.offsets) == 5)
    gate.open.set()
    reading.finish(ticket)
    reading.reader.close()
    np.testing.assert_array_equal(reading.found(0, 5 * ALIGNMENT), BYTES[: 5 * ALIGNMENT])


def test_of_a_cancelled_range_no_more_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(file)
    gate = Gate(monkeypatch)
    ticket = reading.submit(0, 5 * ALIGNMENT)
    assert gate.began.wait(30)
    reading.reader.cancel(ticket)
    assert not ticket.is_over, "a read that is under way still writes to its memory"
    gate.open.set()
    reading.finish(ticket)
    reading.reader.close()
    assert gate.offsets == [0]


def test_file_that_was_shortened_is_an_error_that_names_it(reading: Reading) -> None:
    with reading.file.open("r+b") as file:
        file.truncate(2 * ALIGNMENT + 5)
    ticket = reading.submit(ALIGNMENT, 3 * ALIGNMENT)
    reading.finish(ticket)
    assert isinstance(ticket.error, CheckpointError)
    assert str(ticket.error).startswith(f"{reading.file}: has been shortened to 8,197 bytes")
    after = reading.submit(0, 100)
    reading.finish(after)
    assert after.error is None, "what is still there can be read"


def test_disk_that_fails_is_an_error_that_names_the_place(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    ticket = reading.submit(ALIGNMENT, 5)
    reading.finish(ticket)
    assert "cannot be read at byte 4,096 ([Errno 5] Input/output error)" in str(ticket.error)


def test_file_system_without_direct_reads_is_read_through_the_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    reading = Reading(file)
    assert not reading.reader.is_direct
    ticket = reading.submit(777, SIZE_BYTES - 777)
    reading.finish(ticket)
    reading.reader.close()
    np.testing.assert_array_equal(reading.found(777, SIZE_BYTES - 777), BYTES[777:])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: cannot be opened for reading experts"):
        Reading(tmp_path / "absent")


def test_closing_ends_threads_and_waits_for_no_queue(file: Path) -> None:
    reading = Reading(file)
    tickets = [reading.submit(0, SIZE_BYTES) for _ in range(50)]
    reading.reader.close()
    reading.reader.close()
    assert all(ticket.is_over for ticket in tickets)
    assert not any(thread.is_alive() for thread in reading.reader._threads)
