"""A file that is still coming: pieces in any order, a journal of those that are here, a checksum at the end.

Two files lie side by side: NAME.harmonium-part, as long as the whole from the start, and
NAME.harmonium-part.done, a line that says what it will be and then the number of each piece that is written.
Neither name is one that a reader of checkpoints, or another program's cache, takes for a finished file. A
journal that says more than reached the disk (a power cut) is caught by the checksum.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from harmonium.errors import HubError
from harmonium.hub.listing import RemoteFile

PIECE_BYTES = 32 << 20
_HASHED_BYTES = 4 << 20

SUFFIX = ".harmonium-part"


class PartFile:
    """The part of one file in a folder; opening it finds what an earlier run left there.

    Raises HubError when the file cannot be made. `write` and `finish_piece` may be called by several threads,
    each with a piece of its own.
    """

    def __init__(self, folder: Path, file: RemoteFile, piece_bytes: int | None = None) -> None:
        self.file = file
        self.path = folder / (file.checksum + SUFFIX)
        self._journal_path = folder / (file.checksum + SUFFIX + ".done")
        self._piece_bytes = piece_bytes = piece_bytes or PIECE_BYTES
        self.num_pieces = max(1, -(-file.size // piece_bytes))
        self._lock = threading.Lock()
        self._done: set[int] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._open_journal()
                os.ftruncate(self._descriptor, file.size)
            except BaseException:
                os.close(self._descriptor)
                raise
        except OSError as error:
            raise HubError(self._cannot_write(error)) from None

    def _open_journal(self) -> None:
        """Take over what is done, if journal and part belong to this file and were cut the same way."""
        head = f"{self.file.size} {self._piece_bytes}"
        lines: list[str] = []
        if os.fstat(self._descriptor).st_size == self.file.size and self._journal_path.is_file():
            lines = self._journal_path.read_text(encoding="ascii", errors="replace").splitlines()
        numbers = [int(line) for line in lines[1:] if line.isdecimal() and int(line) < self.num_pieces]
        if lines and lines[0] == head:
            self._done = set(numbers)
        else:
            self._journal_path.write_text(head + "\n", encoding="ascii")
        self._journal = self._journal_path.open("a", encoding="ascii")

    def span(self, piece: int) -> tuple[int, int]:
        """The bytes of a piece: first, and one after the last."""
        first = piece * self._piece_bytes
        return first, min(first + self._piece_bytes, self.file.size)

    @property
    def missing(self) -> list[int]:
        """Pieces that are not here yet, in order."""
        return [piece for piece in range(self.num_pieces) if piece not in self._done]

    @property
    def done_bytes(self) -> int:
        """Of the pieces that are here."""
        return sum(end - first for first, end in map(self.span, self._done))

    def write(self, position: int, data: bytes) -> None:
        """Put bytes at their place. Raises HubError when the disk is full or fails."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._descriptor, view, position)
                position, view = position + written, view[written:]
        except OSError as error:
            raise HubError(self._cannot_write(error)) from None

    def finish_piece(self, piece: int) -> bool:
        """Note that a piece is here; whether it was the last. Raises HubError as `write` does."""
        with self._lock:
            if piece in self._done:
                return False
            try:
                self._journal.write(f"{piece}\n")
                self._journal.flush()
            except OSError as error:
                raise HubError(self._cannot_write(error)) from None
            self._done.add(piece)
            return len(self._done) == self.num_pieces

    def is_right(self, keep_on: Callable[[], None]) -> bool:
        """Whether the bytes have the checksum that the hub gives. keep_on: called now and then, may raise."""
        return has_checksum(self.path, self.file, keep_on)

    def forget(self) -> None:
        """Begin anew: nothing is here."""
        with self._lock:
            self._journal.close()
            self._done.clear()
            self._journal_path.unlink(missing_ok=True)
            self._open_journal()

    def publish(self, target: Path) -> None:
        """Give the finished file its name, on disk before it has it. Raises HubError."""
        try:
            os.fsync(self._descriptor)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.path.replace(target)
            self._journal_path.unlink(missing_ok=True)
        except OSError as error:
            raise HubError(f"{target}: cannot be written ({error.strerror or error})") from None

    def close(self) -> None:
        """Let go of both files. A second call does nothing."""
        self._journal.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _cannot_write(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"{self.path.parent}: the disk is full; what came is kept, and the same command goes on from "
                "there once there is room"
            )
        return f"{self.path}: cannot be written ({error.strerror or error})"


def has_checksum(path: Path, file: RemoteFile, keep_on: Callable[[], None] = lambda: None) -> bool:
    """Whether a file's bytes are those that the hub lists. Raises HubError when it cannot be read."""
    try:
        if path.stat().st_size != file.size:
            return False
        if file.sha256 is not None:
            digest = hashlib.sha256()
        else:
            # Git's names of files, not a protection: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
            digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as stream:
            while data := stream.read(_HASHED_BYTES):
                digest.update(data)
                keep_on()
    except OSError as error:
        raise HubError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest() == file.checksum
