"""Files that a user names: bounded when read, whole when written, and a clear error for everything else."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path

import pytest

from harmonium import text_file
from harmonium.errors import ConfigError
from harmonium.text_file import expand_home, read_text, write_text


def test_endless_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"/dev/zero has more than 1,000 bytes"):
        read_text("/dev/zero")


def test_endless_stdin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    with pytest.raises(ConfigError, match=r"stdin has more than 1,000 bytes"):
        read_text("-")


def test_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("1 2 3",), kwargs={"encoding": "utf-8"})
    writer.start()
    assert read_text(pipe) == "1 2 3"
    writer.join()


def test_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_text(tmp_path / "file") == "[1]"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("no", "No such file"), (".", "Is a directory"), ("a" * 300, "too long"), ("a\0b", "embedded null")],
)
def test_what_cannot_be_read_is_named(name: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_text(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("no/x", "No such file"), (".", "no regular file"), ("a" * 300, "too long"), ("a\0b", "embedded null")],
)
def test_what_cannot_be_written_is_named(name: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        write_text(tmp_path / name, "text", may_replace=True)
    assert list(tmp_path.iterdir()) == []


def test_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """A program that runs as root would take /dev/null from everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="no regular file"):
        write_text(pipe, "text", may_replace=True)
    assert pipe.is_fifo()


def test_file_is_replaced_only_where_that_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old", encoding="utf-8")
    with pytest.raises(FileExistsError):
        write_text(file, "new", may_replace=False)
    assert file.read_text(encoding="utf-8") == "old"
    write_text(file, "new", may_replace=True)
    assert file.read_text(encoding="utf-8") == "new"


def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: object) -> Path:
        raise OSError(28, "No space left on device")

    file = tmp_path / "file"
    file.write_text("old", encoding="utf-8")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        write_text(file, "new", may_replace=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert file.read_text(encoding="utf-8") == "old"


def test_home_of_nobody_stays_as_it_is_written() -> None:
    assert expand_home("~no-such-user-at-all/x") == Path("~no-such-user-at-all/x")
    assert expand_home("~/x") == Path.home() / "x"
