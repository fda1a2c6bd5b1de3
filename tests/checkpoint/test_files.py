"""Files are looked at before they are read: nothing here may hang, and JSON is strict."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from harmonium.checkpoint.files import open_regular, parse_json_object, read_json_object, shorten
from harmonium.errors import CheckpointError


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe, socket or device"):
        open_regular(tmp_path / "pipe")


def test_a_link_to_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="pipe, socket or device"):
        open_regular(tmp_path / "zero")


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A socket's path may have at most about 100 characters, so it is given relative to the folder.
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(CheckpointError, match="pipe, socket or device"):
            open_regular(Path("s"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; expected a file"):
        open_regular(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.json: does not exist"):
        open_regular(tmp_path / "nothing.json")


def test_a_link_to_nothing_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a link to a file that does not exist"):
        open_regular(tmp_path / "link")


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_regular(tmp_path / "a")


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_regular(tmp_path / ("x" * 5000))
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_regular(Path("a\0b"))


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_text("{}")
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser may read everything, so the refusal is played

        def refuse(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="permission denied"):
        open_regular(path)


def test_no_descriptor_leaks_when_a_file_is_refused(tmp_path: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs Linux's /proc")
    (tmp_path / "empty").touch()
    before = len(list(folder.iterdir()))
    for _ in range(5):
        with pytest.raises(CheckpointError, match="is empty"):
            open_regular(tmp_path / "empty")
    assert len(list(folder.iterdir())) == before


def test_a_huge_json_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no space
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes; expected at most 1,000"):
        read_json_object(tmp_path / "config.json", 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"[]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"b": {"a": 1, "a": 1}}', "'a' occurs twice"),
        (b'{"a": Infinity}', "holds Infinity"),
        (b'{"a": "\xe9"}', r"is not UTF-8 \(byte 7\)"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
        (b'{"a": 1} x', "is not JSON"),
        (b'{"a":' * 50_000, "nested too deeply|is not JSON"),
    ],
)
def test_json_is_strict(text: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_json_object(text, "config.json")


def test_messages_stay_short() -> None:
    assert len(shorten("x" * 10_000)) < 150
    assert shorten("x") == "'x'"
