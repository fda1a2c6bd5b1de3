"""Every way in which a safetensors file can lie has its own refusal, and no header can crash the reader."""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harmonium.checkpoint.safetensors import (
    MAX_HEADER_BYTES,
    SafetensorsFile,
    page_span,
    parse_header,
    write_safetensors,
)
from harmonium.errors import CheckpointError

A = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}
DATA = bytes(range(16))


def pack(header: object, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def test_a_sound_file_gives_its_numbers(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path, pack({"__metadata__": {"format": "pt"}, "a": A, "b": B})))
    a, b = file.entries["a"], file.entries["b"]
    np.testing.assert_array_equal(
        file.view(a.dtype, a.shape, a.offset), np.frombuffer(DATA[:12], "<u2").reshape(2, 3)
    )
    assert file.view(b.dtype, b.shape, b.offset).tolist() == [12, 13, 14, 15]


HOSTILE: dict[str, tuple[bytes, str]] = {
    "file of 9 bytes": (b"\x01" + bytes(8), "has 9 bytes"),
    "header longer than the file": (struct.pack("<Q", 5000) + b"{}", "5,000 bytes; the file has 2"),
    "header over the limit": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}" * 8,
        "expected at most 16,000,000",
    ),
    "header length of 2**64 - 1": (b"\xff" * 8 + b"{}", "expected at most"),
    "header not JSON": (pack(b'{"a": nope}'), "is not JSON"),
    "header not UTF-8": (pack(b'{"\xff": 1}'), "is not UTF-8"),
    "header is a list": (pack(b"[1, 2]"), r"begins with b'\['"),
    "header begins with a space": (pack(b" {}", b""), "begins with b' '"),
    "header nested too deeply": (pack(b'{"a":' * 100_000, b""), "nested too deeply|not JSON"),
    "name twice": (
        pack(b'{"a": %s, "a": %s}' % (json.dumps(A).encode(), json.dumps(A).encode())),
        "'a' occurs twice",
    ),
    "NaN in the header": (pack(b'{"a": NaN}'), "holds NaN"),
    "number of 5,000 digits": (pack(b'{"a": %s}' % (b"9" * 5000)), "JSON"),
    "metadata not strings": (pack({"__metadata__": {"a": 1}, "a": A, "b": B}), "not an object of strings"),
    "metadata a list": (pack({"__metadata__": [], "a": A, "b": B}), "not an object of strings"),
    "tensor not an object": (pack({"a": 7}), "is a JSON int"),
    "dtype missing": (pack({"a": {"shape": [], "data_offsets": [0, 0]}}), "has no dtype"),
    "shape missing": (pack({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "has no shape"),
    "data_offsets missing": (pack({"a": {"dtype": "U8", "shape": [0]}}), "has no data_offsets"),
    "dtype unknown": (pack({"a": {**A, "dtype": "Q4_K"}}), "dtype is 'Q4_K'"),
    "dtype a number": (pack({"a": {**A, "dtype": 3}}), "dtype is 3"),
    "shape negative": (pack({"a": {**A, "shape": [-2, -3]}}), r"shape is \[-2, -3\]"),
    "shape of floats": (pack({"a": {**A, "shape": [2.0, 3]}}), r"shape is \[2.0, 3\]"),
    "shape of booleans": (pack({"a": {**A, "shape": [True, 6]}}), r"shape is \[True, 6\]"),
    "shape a number": (pack({"a": {**A, "shape": 6}}), "shape is 6"),
    "shape with 17 axes": (pack({"a": {**A, "shape": [1] * 17}}), "at most 16"),
    "shape that overflows 64 bits": (
        pack({"a": {**A, "shape": [1 << 62, 1 << 62, 1 << 62]}}),
        "data_offsets give 12 bytes",
    ),
    "axis of 2**63": (pack({"a": {**A, "shape": [1 << 63]}}), r"from 0 to 2\*\*63 - 1"),
    "offsets reversed": (pack({"a": {**A, "data_offsets": [12, 0]}}), "the end lies before"),
    "offset negative": (pack({"a": {**A, "data_offsets": [-12, 0]}}), "expected two whole numbers"),
    "offset a string": (pack({"a": {**A, "data_offsets": ["0", 12]}}), "expected two whole numbers"),
    "three offsets": (pack({"a": {**A, "data_offsets": [0, 6, 12]}}), "expected two whole numbers"),
    "size does not match the shape": (pack({"a": {**A, "data_offsets": [0, 16]}}), "16 bytes; BF16"),
    "tensor past the end": (
        pack({"a": A, "b": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [12, 12 + (1 << 40)]}}),
        "ends at byte .*truncated",
    ),
    "shard truncated": (pack({"a": A, "b": B}, DATA[:-1]), "truncated"),
    "overlap": (pack({"a": A, "b": {**B, "data_offsets": [10, 14]}}, DATA[:14]), "overlaps tensor 'a'"),
    "same bytes twice": (pack({"a": A, "c": A}, DATA[:12]), "overlaps tensor"),
    "hole": (pack({"a": A, "b": {**B, "data_offsets": [13, 17]}}, DATA + b"x"), "hole after tensor 'a'"),
    "hole at the beginning": (pack({"b": B}), "hole after the header"),
    "trailing bytes": (pack({"a": A, "b": B}, DATA + b"x"), "trailing bytes"),
    "bits that fill no byte": (
        pack({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"x"),
        "F4",
    ),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "git lfs pull",
    ),
    "GGUF": (b"GGUF" + bytes(60), "this is a GGUF file; expected safetensors here"),
    "zip archive": (b"PK\x03\x04" + bytes(60), "pickles are never loaded"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "pickle"),
    "web page": (b"<!DOCTYPE html><html>not found</html>", "web page"),
    "empty": (b"", r"is empty \(0 bytes\)"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    content, message = HOSTILE[kind]
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 1000


def test_an_empty_tensor_takes_no_place(tmp_path: Path) -> None:
    empty = {"dtype": "BF16", "shape": [0, 7], "data_offsets": [12, 12]}
    file = SafetensorsFile(write(tmp_path, pack({"z": empty, "a": A, "b": B})))
    entry = file.entries["z"]
    assert file.view(entry.dtype, entry.shape, entry.offset).shape == (0, 7)


def test_a_tensor_at_an_odd_byte_is_an_aligned_read_only_copy(tmp_path: Path) -> None:
    first = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    second = {"dtype": "BF16", "shape": [2], "data_offsets": [1, 5]}
    text = json.dumps({"a": first, "b": second}).encode()
    content = pack(text + b" " * (len(text) % 2), b"\x07\x01\x02\x03\x04")
    file = SafetensorsFile(write(tmp_path, content))
    view = file.view("BF16", (2,), file.entries["b"].offset)
    assert view.tolist() == [0x0201, 0x0403]
    assert view.flags.aligned
    assert not view.flags.writeable


def test_what_is_written_is_read_back_and_no_temporary_file_stays(tmp_path: Path) -> None:
    tensors: list[tuple[str, str, Any]] = [
        ("x", "BF16", np.array([[0, 1], [2, 3], [4, 5]], np.uint16)),
        ("empty", "U8", np.zeros((0, 3), np.uint8)),
        ("y", "U8", np.arange(5, dtype=np.uint8)),
        ("turned", "F32", np.arange(6, dtype=np.float32).reshape(2, 3).T),
    ]
    path = tmp_path / "out.safetensors"
    write_safetensors(path, tensors)
    assert os.listdir(tmp_path) == ["out.safetensors"]  # noqa: PTH208
    file = SafetensorsFile(path)
    assert list(file.entries) == [name for name, _, _ in tensors]
    for name, dtype, array in tensors:
        entry = file.entries[name]
        assert entry.dtype == dtype
        np.testing.assert_array_equal(file.view(dtype, entry.shape, entry.offset), array)


def test_our_files_agree_with_the_safetensors_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    numbers: dict[str, Any] = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "u": np.arange(7, dtype=np.uint8),
    }
    write_safetensors(tmp_path / "ours.safetensors", [("f", "F32", numbers["f"]), ("u", "U8", numbers["u"])])
    theirs = library.load_file(tmp_path / "ours.safetensors")
    library.save_file(numbers, tmp_path / "theirs.safetensors")
    file = SafetensorsFile(tmp_path / "theirs.safetensors")
    for name, expected in numbers.items():
        np.testing.assert_array_equal(theirs[name], expected)
        entry = file.entries[name]
        np.testing.assert_array_equal(file.view(entry.dtype, entry.shape, entry.offset), expected)


def test_page_span_covers_outwards_and_spares_neighbors_inwards() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    assert page_span(page + 1, page, outward=True) == (page, 3 * page)
    first, last = page_span(page + 1, page, outward=False)
    assert last <= first
    assert page_span(page - 1, 2 * page + 2, outward=False) == (page, 3 * page)
    assert page_span(2 * page, page, outward=True) == page_span(2 * page, page, outward=False)


def test_willneed_covers_the_tensors_pages_and_dontneed_spares_its_neighbors(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    numbers = np.zeros(2 * page + 100, np.uint8)
    write_safetensors(tmp_path / "m", [(name, "U8", numbers) for name in "abc"])
    file = SafetensorsFile(tmp_path / "m")
    calls: list[tuple[int, int, int]] = []

    class RecordingMap:
        def __len__(self) -> int:
            return (tmp_path / "m").stat().st_size

        def madvise(self, option: int, start: int, length: int) -> None:
            calls.append((option, start, start + length))

    file._map = RecordingMap()  # type: ignore[assignment]
    entry = file.entries["b"]
    begin, end = entry.offset, entry.offset + entry.nbytes
    file.advise("willneed", begin, entry.nbytes)
    file.advise("dontneed", begin, entry.nbytes)
    (need, first, last), (drop, inner_first, inner_last) = calls
    assert (need, drop) == (mmap.MADV_WILLNEED, mmap.MADV_DONTNEED)
    assert first <= begin < first + page
    assert last - page < end <= last
    assert begin <= inner_first < begin + page
    assert end - page < inner_last <= end


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_dontneed_gives_memory_back(tmp_path: Path) -> None:
    size = 48 << 20
    write_safetensors(tmp_path / "m", [("a", "U8", np.ones(size, np.uint8))])
    file = SafetensorsFile(tmp_path / "m")
    entry = file.entries["a"]
    view = file.view("U8", entry.shape, entry.offset)
    before = _resident_file_bytes()
    assert int(view[:: 1 << 10].sum()) == size >> 10
    assert _resident_file_bytes() - before > size // 2
    file.advise("dontneed", entry.offset, entry.nbytes)
    assert _resident_file_bytes() - before < size // 8
    assert int(view[:: 1 << 10].sum()) == size >> 10


def _resident_file_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(1 << 63),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def headers(draw: st.DrawFn) -> dict[str, object]:
    """A sound header with up to three of its values replaced by anything."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}, "a": dict(A), "b": dict(B)}
    for _ in range(draw(st.integers(0, 3))):
        tensor = header[draw(st.sampled_from(["a", "b"]))]
        if isinstance(tensor, dict):
            tensor[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
                JSON_VALUES
                | st.lists(st.integers(-2, 20), max_size=3)
                | st.sampled_from(["U8", "BF16", "F4", "F64"])
            )
    if draw(st.booleans()):
        header[draw(st.text(max_size=4))] = draw(JSON_VALUES)
    return header


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(headers(), st.integers(0, 40))
def test_no_header_raises_anything_else_or_reaches_outside(header: dict[str, object], num_bytes: int) -> None:
    text = json.dumps(header).encode()
    size = 8 + len(text) + num_bytes
    try:
        entries = parse_header(text, 8 + len(text), size, Path("m"))
    except CheckpointError:
        return
    assert sum(entry.nbytes for entry in entries.values()) == num_bytes
    assert all(8 + len(text) <= e.offset and e.offset + e.nbytes <= size for e in entries.values())


def test_no_mutated_file_raises_anything_else(tmp_path: Path) -> None:
    sound = pack({"__metadata__": {"format": "pt"}, "a": A, "b": B})
    generator = random.Random(1)
    num_refused = 0
    for _ in range(1200):
        content = bytearray(sound)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(content))
            action = generator.randrange(4)
            if action == 0:
                content[place] = generator.randrange(256)
            elif action == 1:
                content[place] ^= 1 << generator.randrange(8)
            elif action == 2:
                del content[place : place + generator.randint(1, 3)]
            else:
                content[place:place] = generator.choice([b"9", b"-", b"[", b"0" * 30, b'"', b"\xff", b"e9"])
        path = write(tmp_path, bytes(content))
        try:
            file = SafetensorsFile(path)
        except CheckpointError:
            num_refused += 1
            continue
        for entry in file.entries.values():
            if entry.dtype in ("BF16", "U8"):
                assert file.view(entry.dtype, entry.shape, entry.offset).nbytes == entry.nbytes
    assert num_refused > 600
