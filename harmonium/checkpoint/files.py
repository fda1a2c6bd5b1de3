"""Opening files that we have no reason to trust: what they are is checked before a byte is believed."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from harmonium.errors import CheckpointError

MAX_CONFIG_BYTES = 1 << 20
"""A released config.json has under 2 KB."""

MAX_INDEX_BYTES = 16 << 20
"""The index of the released 120b has under 100 KB."""

_FOREIGN = (
    (
        b"version https://git-lfs",
        "this is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    ),
    (b"GGUF", "this is a GGUF file; expected safetensors here (a GGUF file is given by itself)"),
    (
        b"PK\x03\x04",
        "this is a zip archive (PyTorch's pickle format?); pickles are never loaded, expected safetensors",
    ),
    (b"\x80\x02", "this is a Python pickle; pickles are never loaded, expected safetensors"),
    (b"\x80\x04", "this is a Python pickle; pickles are never loaded, expected safetensors"),
    (b"<!DOCTYPE", "this is a web page; the download went wrong"),
    (b"<html", "this is a web page; the download went wrong"),
)
"""First bytes of files that people have in place of a checkpoint's, and what to say of them."""


def shorten(value: object) -> str:
    """repr, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:110]}... ({len(text):,} characters)"


def open_regular(path: Path) -> tuple[int, int]:
    """Open for reading: (file descriptor, size in bytes). The caller closes the descriptor.

    Links are followed; what they end at must be a regular file, so no pipe or device can make us wait.
    Raises CheckpointError for anything else, for a file that may not be read and for an empty one.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        # Looked at before it is opened: opening some devices already has an effect.
        _require_regular(path, path.stat().st_mode)
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        what = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise CheckpointError(f"{path}: {what}") from None
    except PermissionError:
        raise CheckpointError(f"{path}: may not be read (permission denied)") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened ({error})") from None
    try:
        status = os.fstat(descriptor)
        _require_regular(path, status.st_mode)
        if status.st_size == 0:
            raise CheckpointError(f"{path}: is empty (0 bytes)")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: is a folder; expected a file")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is a pipe, socket or device; expected a regular file")


def refuse_foreign(path: Path, first_bytes: bytes) -> None:
    """Raise CheckpointError when the file begins like something well known that is not what we read."""
    for magic, message in _FOREIGN:
        if first_bytes.startswith(magic):
            raise CheckpointError(f"{path}: {message}")


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError for everything else, naming the file."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size > max_bytes:
            raise CheckpointError(f"{path}: has {size:,} bytes; expected at most {max_bytes:,}")
        text = file.read(max_bytes + 1)
    refuse_foreign(path, text[:64])
    return parse_json_object(text, str(path))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object, no key twice in an object, no NaN or Infinity.

    where: what the message starts with. Raises CheckpointError.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise CheckpointError(f"{where}: holds {name}; JSON has no such number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise CheckpointError(f"{where}: the key {shorten(twice)} occurs twice in one object")
        return table

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: is not UTF-8 (byte {error.start:,})") from None
    except RecursionError:
        raise CheckpointError(f"{where}: is nested too deeply") from None
    except ValueError as error:
        # JSONDecodeError, and what int() says of a number with thousands of digits.
        raise CheckpointError(f"{where}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}; expected an object")
    return value
