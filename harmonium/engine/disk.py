"""Cache blocks on disk: what a prompt computed is there again after a restart.

A file holds the keys and values of one block of one kind ("full" or "window" layers), under the hash of its
chain (prefix.py). It is written once, by a thread of its own, under another name and then renamed, so that a
reader sees all of it or nothing; it is used after its length, its checksum, its chain and its token ids have
been compared, so a file that was cut or changed is no worse than one that is missing. The folder may be
shared by processes and is named for what the numbers depend on; it holds what was said, so only its owner may
look.

The least recently used files go first when the folder passes its limit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from harmonium.checkpoint.model_config import LayerKind
from harmonium.engine.prefix import PrefixNode
from harmonium.errors import ConfigError

_log = logging.getLogger("harmonium.engine")

_HEADER = struct.Struct("<8s16s16s16sQI")
"""magic, kind, digest, parent's digest, bytes of keys and values, CRC-32 of token ids and those bytes."""

_MAGIC = b"HARMKV\x00\x01"

_MAX_QUEUED = 64
"""Blocks that wait to be written (50 MB for a 20b); one more is not kept."""

Item = tuple[bytes, LayerKind, bytes, bytes, bytes]


class BlockFiles:
    """A folder of blocks. `save` returns at once; `load` reads. Used by one thread, besides its own."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Make the folder, or take stock of what is in it. Raises ConfigError when it cannot be used."""
        self.num_saved = self.num_loaded = self.num_damaged = self.num_dropped = 0
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(13, "no permission to write", str(folder))
            self._take_stock()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"the cache folder {folder} cannot be used: {reason}") from None
        self._queue: queue.Queue[Item | None] = queue.Queue(_MAX_QUEUED)
        self._waiting: set[str] = set()
        self._thread = threading.Thread(target=self._write_all, name="harmonium-cache", daemon=True)
        self._thread.start()

    @property
    def size_bytes(self) -> int:
        """Of the files that this process knows."""
        with self._lock:
            return sum(self._sizes.values())

    def has(self, digest: bytes, kind: LayerKind) -> bool:
        """Whether a file of that name is there; another process may have written it."""
        name = _name(digest, kind)
        with self._lock:
            if name in self._sizes:
                return True
        return (self._folder / name).exists()

    def save(
        self,
        digest: bytes,
        kind: LayerKind,
        parent: bytes,
        token_bytes: bytes,
        read: Callable[[], bytes],
    ) -> None:
        """Write a block in the background, unless it is there. read: called now, if need be."""
        name = _name(digest, kind)
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
                return
            if name in self._waiting:
                return
            self._waiting.add(name)
        try:
            self._queue.put_nowait((digest, kind, parent, token_bytes, read()))
        except queue.Full:
            self.num_dropped += 1
            with self._lock:
                self._waiting.discard(name)

    def load(self, digest: bytes, kind: LayerKind, parent: bytes, token_bytes: bytes) -> bytes | None:
        """The bytes of this very block, None when no whole file has it. A damaged file is removed."""
        name = _name(digest, kind)
        path = self._folder / name
        try:
            content = path.read_bytes()
        except OSError:
            self._forget(name)
            return None
        data = _unwrap(content, digest, kind, parent, token_bytes)
        if data is None:
            self.num_damaged += 1
            _log.warning("a block in the cache folder is damaged and was removed: %s", path)
            path.unlink(missing_ok=True)
            self._forget(name)
            return None
        self.num_loaded += 1
        with contextlib.suppress(OSError):
            os.utime(path)  # least recently used is by modification time, for every process
        with self._lock:
            self._sizes[name] = len(content)
            self._sizes.move_to_end(name)
        return data

    def flush(self) -> None:
        """Return when everything that was saved so far is on disk, or has failed."""
        self._queue.join()

    def close(self) -> None:
        """Write what waits, and end. A second call does nothing."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _take_stock(self) -> None:
        found: list[tuple[int, str, int]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process cleans up too
                if path.name.startswith("writing-"):
                    if not _is_alive(path.name):
                        path.unlink()
                elif path.suffix in (".full", ".window"):
                    status = path.stat()
                    found.append((status.st_mtime_ns, path.name, status.st_size))
        for _, name, size in sorted(found):
            self._sizes[name] = size

    def _write_all(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                self._write(*item)
            except OSError as error:
                # A full disk must not end an answer: the block is only not kept.
                self.num_dropped += 1
                _log.warning("a block could not be written to the cache folder: %s", error)
            finally:
                if item is not None:
                    with self._lock:
                        self._waiting.discard(_name(item[0], item[1]))
                self._queue.task_done()

    def _write(self, digest: bytes, kind: LayerKind, parent: bytes, token_bytes: bytes, data: bytes) -> None:
        name = _name(digest, kind)
        content = _wrap(digest, kind, parent, token_bytes, data)
        self._make_room(len(content))
        temporary = self._folder / f"writing-{os.getpid()}-{name}"
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
            temporary.rename(self._folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        with self._lock:
            self._sizes[name] = len(content)
        self.num_saved += 1

    def _make_room(self, num_bytes: int) -> None:
        with self._lock:
            total = sum(self._sizes.values()) + num_bytes
            names = []
            for name, size in self._sizes.items():
                if total <= self._limit_bytes:
                    break
                names.append(name)
                total -= size
            for name in names:
                del self._sizes[name]
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._sizes.pop(name, None)


def _name(digest: bytes, kind: LayerKind) -> str:
    return f"{digest.hex()}.{kind}"


def _is_alive(name: str) -> bool:
    """Whether the process that writes this temporary file is still there."""
    words = name.split("-")
    try:
        os.kill(int(words[1]), 0)
    except (ValueError, IndexError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(words[1]) != os.getpid()  # a former process had our number


def _wrap(digest: bytes, kind: LayerKind, parent: bytes, token_bytes: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(token_bytes))
    header = _HEADER.pack(_MAGIC, kind.encode(), digest, parent, len(data), checksum)
    return header + token_bytes + data


def _unwrap(
    content: bytes, digest: bytes, kind: LayerKind, parent: bytes, token_bytes: bytes
) -> bytes | None:
    start = _HEADER.size + len(token_bytes)
    data = content[start:]
    expected = _HEADER.pack(
        _MAGIC, kind.encode(), digest, parent, len(data), zlib.crc32(data, zlib.crc32(token_bytes))
    )
    return data if content[:start] == expected + token_bytes else None


@runtime_checkable
class RunnerBlocks(Protocol):
    """A runner whose cache blocks can be read and written."""

    def read_block(self, kind: LayerKind, block: int) -> bytes:
        """Keys and values of a block, all layers of its kind."""
        ...

    def write_block(self, kind: LayerKind, block: int, data: bytes) -> bool:
        """Put them back; False when there are not as many bytes as a block has."""
        ...


class StoredBlocks:
    """A runner's blocks in files: what PagedCache keeps them with."""

    def __init__(self, files: BlockFiles, runner: RunnerBlocks) -> None:
        self._files = files
        self._runner = runner

    def has(self, digest: bytes, kind: LayerKind) -> bool:
        return self._files.has(digest, kind)

    def save(self, node: PrefixNode, kind: LayerKind) -> None:
        block = node.full_block if kind == "full" else node.window_block
        chain = node.parent_digest, node.token_bytes
        self._files.save(node.digest, kind, *chain, lambda: self._runner.read_block(kind, block))

    def load(self, digest: bytes, parent: bytes, token_bytes: bytes, kind: LayerKind, block: int) -> bool:
        data = self._files.load(digest, kind, parent, token_bytes)
        return data is not None and self._runner.write_block(kind, block, data)
