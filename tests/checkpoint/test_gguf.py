"""GGUF headers: what is read, and what lies is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from harmonium.checkpoint.gguf import GgufArray, GgufFile
from harmonium.errors import CheckpointError
from tests.checkpoint.gguf_files import Tensors, gguf_bytes, text

ONE: Tensors = [("a", "F32", np.arange(64, dtype=np.float32).reshape(2, 32))]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_metadata_and_tensors_come_back(tmp_path: Path) -> None:
    metadata = {"x.n": 7, "x.f": 0.5, "x.t": "text", "x.b": True, "x.list": ["a", "bc"]}
    file = GgufFile(write(tmp_path / "x.gguf", gguf_bytes(metadata, ONE)))
    assert file.metadata == {**metadata, "x.list": GgufArray(2)}
    tensor = file.tensors["a"]
    assert tensor.shape == (2, 32) and tensor.type.name == "F32"
    assert np.array_equal(file.view(tensor).view("<f4"), ONE[0][2])
    file.close()
    with pytest.raises(CheckpointError, match="has been closed"):
        file.view(tensor)


def test_alignment_is_the_files_own(tmp_path: Path) -> None:
    data = gguf_bytes({"general.alignment": 64}, ONE * 1, alignment=64)
    file = GgufFile(write(tmp_path / "x.gguf", data))
    assert file.tensors["a"].offset % 64 == 0
    assert np.array_equal(file.view(file.tensors["a"]).view("<f4"), ONE[0][2])


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    data = gguf_bytes({"x.t": "text", "x.list": ["a", "bc"]}, ONE)
    for length in range(1, len(data)):
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            GgufFile(write(tmp_path / "x.gguf", data[:length]))


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def lying(*entries: bytes, count: int | None = None, metadata: bytes = b"", version: int = 3) -> bytes:
    """A header with these entries, and 4 kB after it."""
    num_metadata = 1 if metadata else 0
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries) if count is None else count, num_metadata)
    head += metadata + b"".join(entries)
    return head + b"\0" * (-len(head) % 32) + b"\0" * 4096


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lying(version=1), "has GGUF version 1; expected 2 or 3"),
        (lying(version=3 << 24), "it is big-endian"),
        (lying(count=1 << 40), "says it has 1,099,511,627,776 tensors"),
        (lying(entry("a", (2, 32), 12, 0)), "tensor 'a': has ggml type Q4_K; expected one of BF16"),
        (lying(entry("a", (2, 32), 99, 0)), "has ggml type number 99"),
        (lying(entry("a", (2, 33), 39, 0)), "rows have 33 numbers; MXFP4 takes 32 at a time"),
        (lying(entry("a", (2, 32), 0, 7)), "offset 7 is no multiple of 32"),
        (lying(entry("a", (1 << 40, 1 << 40), 0, 0)), "which no file holds"),
        (lying(entry("a", (4096,), 0, 0)), r"ends at byte 16,\d+; the file has 4,\d+ \(truncated"),
        (lying(entry("a", (8,), 0, 1 << 60)), "ends at byte"),
        (lying(entry("a", (8,), 0, 0), entry("a", (8,), 0, 32)), "tensor 'a' occurs twice"),
        (
            lying(entry("a", (32,), 0, 0), entry("b", (8,), 0, 32)),
            "tensor 'b': begins at .* and overlaps 'a'",
        ),
        (lying(entry("a", (1, 1, 1, 1, 1), 0, 0)), "has 5 axes"),
        (lying(text("x" * 70_000)), "a name of a tensor has 70,000 bytes"),
        (lying(metadata=text("k") + struct.pack("<I", 77)), "metadata 'k' has type 77"),
        (lying(metadata=text("k") + struct.pack("<IIQ", 9, 9, 1)), "array of type 9"),
        (lying(metadata=text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)), "more than the file has room for"),
        (lying(metadata=text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 62)), "inside an array of strings"),
        (lying(metadata=text("k") + struct.pack("<IIQ", 9, 0, 1 << 62)), "inside its header"),
        (lying(metadata=text("general.alignment") + struct.pack("<II", 4, 3)), "expected a power of two"),
    ],
)
def test_headers_that_lie_are_refused(data: bytes, expected: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=expected):
        GgufFile(write(tmp_path / "x.gguf", data))


def test_other_files_are_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        GgufFile(write(tmp_path / "x.gguf", b"x" * 100))
