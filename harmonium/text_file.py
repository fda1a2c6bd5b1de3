"""Text files and streams that a user names: read with a limit, written whole or not at all."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from harmonium.errors import ConfigError

MAX_TEXT_BYTES = 64_000_000
"""Far above what a context holds; a device that never ends is refused here and not when memory is gone."""


def read_text(path: str | Path) -> str:
    """A file's text, or stdin's for `-`. Raises ConfigError with the reason when it cannot be read.

    Pipes are read to their end. A mark of byte order at the beginning is left out.
    """
    if str(path) == "-":
        text = sys.stdin.read(MAX_TEXT_BYTES + 1)
        _refuse_long("stdin", len(text))
        return text
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {_reason(error)}") from None
    _refuse_long(str(path), len(raw))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}"
        ) from None


def _refuse_long(name: str, size: int) -> None:
    if size > MAX_TEXT_BYTES:
        raise ConfigError(f"{name} has more than {MAX_TEXT_BYTES:,} bytes, which no context holds")


def write_text(path: Path, text: str, may_replace: bool) -> None:
    """Write a file so that it is there whole or not at all.

    Raises FileExistsError when it exists and may not be replaced; ConfigError when it cannot be written, and
    for what is no regular file: the name of a device or a pipe would be taken from it.
    """
    temporary = None
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file; expected one, or a name that is free")
        if path.exists() and not may_replace:
            raise FileExistsError(path)
        descriptor, temporary = tempfile.mkstemp(prefix=".harmonium.", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        Path(temporary).replace(path)
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({_reason(error)})") from None


def _reason(error: OSError | ValueError) -> str:
    """Without the path, which the message has already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def expand_home(path: str) -> Path:
    """The path with `~` and `~user` replaced; as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
