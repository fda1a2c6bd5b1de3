"""Several files over several connections, each in pieces: retried, resumed, checked."""

from __future__ import annotations

import http.client
import threading
from collections import deque
from collections.abc import Callable, Sequence

from harmonium.errors import HubError
from harmonium.hub.part_file import PartFile
from harmonium.hub.web import Refusal, Unreachable, Web

Progress = Callable[[int, int], None]
"""Called with (bytes here, bytes in all)."""

_READ_BYTES = 1 << 18


class Stopped(HubError):
    """Another part of the transfer failed, or the user ended it."""


class Transfer:
    """Fetches the missing pieces of parts and checks each part when its last piece is here.

    Raises, from `run`: HubError for the first thing that could not be had; what came is kept.
    """

    def __init__(self, web: Web, parts: Sequence[PartFile], num_connections: int) -> None:
        self._web = web
        self._num_connections = num_connections
        self._tasks = deque((part, piece) for part in parts for piece in part.missing)
        # Nothing is missing where a run ended between the last piece and the check.
        self._unchecked = [part for part in parts if not part.missing]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._whole: dict[PartFile, int] = {}  # the thread that gets all of a file that comes in one go
        self._again: set[PartFile] = set()
        self._total = sum(part.file.size for part in parts)
        self._here = {part: part.done_bytes for part in parts}
        self._num_busy = 0

    def run(self, progress: Progress) -> None:
        """Work until all is here. Calls progress from this thread, several times a second.

        An interrupt (KeyboardInterrupt) stops the connections, then goes on upwards.
        """
        threads = [
            threading.Thread(target=self._work, name=f"harmonium-pull-{number}", daemon=True)
            for number in range(self._num_connections)
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                progress(self.here_bytes, self._total)
                for thread in threads:
                    thread.join(0.1 / len(threads))
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(0.2)  # one that waits for the network may be left behind
        progress(self.here_bytes, self._total)
        if self._error is not None:
            raise self._error

    @property
    def here_bytes(self) -> int:
        """What has come so far, that of earlier runs included."""
        return sum(self._here.values())

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                part, piece = task
                try:
                    if piece is not None:
                        self._fetch(part, piece)
                    else:
                        self._check(part)
                finally:
                    with self._lock:
                        self._num_busy -= 1
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that waits in `run`
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def _next(self) -> tuple[PartFile, int | None] | None:
        """The next piece, or a whole part to check (None); None when nothing is left."""
        while True:
            self._keep_on()
            with self._lock:
                if self._unchecked:
                    self._num_busy += 1
                    return self._unchecked.pop(), None
                if self._tasks:
                    self._num_busy += 1
                    return self._tasks.popleft()
                if not self._num_busy:
                    return None
            self._stop.wait(0.05)  # a check that fails makes new pieces

    def _keep_on(self) -> None:
        if self._stop.is_set():
            raise Stopped("the download was ended")

    def _fetch(self, part: PartFile, piece: int) -> None:
        """Get a piece, from where it broke off as often as it does."""
        position, end = part.span(piece)
        failures = 0
        while True:
            if self._whole.get(part, threading.get_ident()) != threading.get_ident():
                return  # another connection gets all of the file
            try:
                reached = self._read(part, piece, position)
                if reached >= end:
                    return
                error: HubError = Unreachable("the connection broke off")
            except _Broken as broken:
                reached, error = broken.position, broken.error
            failures = 1 if reached > position else failures + 1
            position = reached
            is_final = isinstance(error, Refusal) and not error.is_transient
            if is_final or failures >= self._web.patience.attempts:
                raise error
            self._stop.wait(self._web.patience.pause(failures, error))
            self._keep_on()

    def _read(self, part: PartFile, piece: int, position: int) -> int:
        """Get bytes from `position` to the end of the piece; where it came to. Raises _Broken."""
        _, end = part.span(piece)
        if position >= end:  # an empty file
            self._finish(part, piece)
            return end
        try:
            whole = part.num_pieces == 1 and position == 0
            with self._web.get(part.file.url, position, None if whole else end) as answer:
                if answer.status == 200 and not whole:
                    return self._read_all(part, answer)
                if answer.status == 206:
                    _check_range(answer, position, part)
                while position < end:
                    position = self._take(part, answer, position, end)
        except (HubError, OSError, http.client.HTTPException) as error:
            raise _Broken.at(position, error) from None
        self._finish(part, piece)
        return position

    def _read_all(self, part: PartFile, answer: http.client.HTTPResponse) -> int:
        """From a server that knows no ranges: the whole file in one go, by one connection."""
        with self._lock:
            if self._whole.setdefault(part, threading.get_ident()) != threading.get_ident():
                return part.file.size
            self._here[part] = 0
        position = 0
        while position < part.file.size:
            position = self._take(part, answer, position, part.file.size)
        for piece in part.missing:
            self._finish(part, piece)
        return part.file.size

    def _take(self, part: PartFile, answer: http.client.HTTPResponse, position: int, end: int) -> int:
        self._keep_on()
        data = answer.read(min(_READ_BYTES, end - position))
        if not data:
            raise Unreachable(f"{part.file.path}: the connection broke off at byte {position:,}")
        self._keep_on()
        part.write(position, data)
        with self._lock:
            self._here[part] += len(data)
        return position + len(data)

    def _finish(self, part: PartFile, piece: int) -> None:
        if part.finish_piece(piece):
            self._check(part)

    def _check(self, part: PartFile) -> None:
        """Compare with the hub's checksum; once, everything is fetched anew."""
        if part.is_right(self._keep_on):
            return
        part.forget()
        with self._lock:
            if part in self._again:
                raise HubError(
                    f"{part.file.path}: what came twice has another checksum than the hub gives "
                    f"({part.file.checksum[:16]}...); nothing of it was kept. Is something between here and "
                    "the hub changing it?"
                )
            self._again.add(part)
            self._here[part] = 0
            self._tasks.extend((part, piece) for piece in part.missing)


class _Broken(Exception):
    """A piece broke off at a position, for a reason that may pass."""

    def __init__(self, position: int, error: HubError) -> None:
        super().__init__(str(error))
        self.position = position
        self.error = error

    @classmethod
    def at(cls, position: int, error: BaseException) -> BaseException:
        """What to raise: this, or the error itself where trying again is no use."""
        if isinstance(error, (Unreachable, Refusal)):
            return cls(position, error)
        if isinstance(error, HubError):
            return error
        return cls(position, Unreachable(f"the connection broke off ({error or type(error).__name__})"))


def _check_range(answer: http.client.HTTPResponse, position: int, part: PartFile) -> None:
    """A cache in between that answers with other bytes would only be found out by the checksum."""
    given = answer.headers.get("Content-Range") or ""
    if not given.startswith(f"bytes {position}-"):
        raise HubError(f"{part.file.path}: asked for bytes from {position:,} and was given {given[:60]!r}")
    size = given.rpartition("/")[2]
    if size not in ("*", str(part.file.size)):
        raise HubError(f"{part.file.path}: has {size} bytes; the hub lists {part.file.size:,}")
