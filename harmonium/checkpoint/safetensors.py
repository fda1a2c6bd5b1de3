"""Our own reader of safetensors files: memory-mapped, the whole header checked before a view is handed out.

A file is 8 bytes (little-endian length N of the header), N bytes of JSON, then the tensors' bytes. The JSON
maps a name to dtype, shape and data_offsets [begin, end) counted from the first byte after the header; the
key __metadata__ holds strings. The tensors cover the bytes to the end of the file, no hole, no overlap.

Source: the format's description in huggingface/safetensors:README.md.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.files import open_regular, parse_json_object, refuse_foreign, shorten
from harmonium.errors import CheckpointError

MAX_HEADER_BYTES = 16_000_000
"""The format allows 100 MB, which takes gigabytes and many seconds to parse; a gpt-oss has under 0.2 MB."""

MAX_RANK = 16
"""Most axes of a tensor that we read; a checkpoint of this family has at most 4."""

Advice = Literal["willneed", "dontneed"]

_DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "BOOL": 8, "U8": 8, "I8": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Every dtype that the format names, so that a tensor we never use is still placed correctly."""

_NUMPY_DTYPE: dict[str, npt.DTypeLike] = {
    "BF16": "<u2",
    "U8": "u1",
    "F32": "<f4",
    "F16": "<f2",
    "I32": "<i4",
    "I64": "<i8",
}
"""Dtypes that we make views of. BF16 has no NumPy type: its bits come as uint16."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. offset: of its first byte from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """A mapped file with a header that has been checked whole.

    Views hold the map: one that outlives `close` stays valid, and the map goes when the last of them does.
    Nobody may shorten the file meanwhile: the operating system would end the process with SIGBUS. `view` and
    `check_size` notice it where it has happened before they are called; whoever replaces a checkpoint writes
    a new file and renames it.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; no tensor is read. Raises CheckpointError."""
        self.path = path
        descriptor, size = open_regular(path)
        try:
            header_bytes, text = _read_header(path, descriptor, size)
            self.entries: Mapping[str, Entry] = parse_header(text, 8 + header_bytes, size, path)
            self._map: mmap.mmap | None = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped into memory ({error})") from None
        finally:
            os.close(descriptor)

    def view(self, dtype: str, shape: tuple[int, ...], offset: int) -> npt.NDArray[Any]:
        """A read-only array over the map. The place must lie inside an entry (an invariant of the caller).

        Where a tensor of two-byte numbers begins at an odd byte, which the format allows and nobody writes,
        the array is a read-only copy, because kernels need aligned numbers.
        """
        self.check_size()
        assert self._map is not None, "check_size refuses a closed file"
        array: npt.NDArray[Any] = np.frombuffer(
            self._map, dtype=_NUMPY_DTYPE[dtype], count=math.prod(shape), offset=offset
        ).reshape(shape)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def check_size(self) -> None:
        """Raise CheckpointError when the file is shorter than its map or has been closed. Costs one fstat."""
        if self._map is None:
            raise CheckpointError(f"{self.path}: has been closed")
        if self._map.size() < len(self._map):
            raise CheckpointError(
                f"{self.path}: has been shortened to {self._map.size():,} bytes while it was in use; it had "
                f"{len(self._map):,}"
            )

    def advise(self, advice: Advice, offset: int, nbytes: int) -> None:
        """Tell the operating system that these bytes will be read soon, or that their pages may leave memory.

        willneed covers every page that the bytes touch; dontneed only those that hold nothing else. It is a
        hint: nothing happens where the system has no madvise, and what is read afterwards is the same.
        """
        if self._map is None:
            raise CheckpointError(f"{self.path}: has been closed")
        option = getattr(mmap, "MADV_WILLNEED" if advice == "willneed" else "MADV_DONTNEED", None)
        if option is None or not hasattr(self._map, "madvise"):
            return
        first, last = page_span(offset, nbytes, outward=advice == "willneed")
        if last > first:
            self._map.madvise(option, first, min(last, len(self._map)) - first)

    def close(self) -> None:
        """Let go of the map; views that exist keep it. A second call does nothing."""
        self._map = None


def page_span(offset: int, nbytes: int, outward: bool) -> tuple[int, int]:
    """[first, last) in bytes, whole pages: those that the range touches (outward) or wholly covers."""
    page = mmap.PAGESIZE
    end = offset + nbytes
    if outward:
        return offset // page * page, -(-end // page) * page
    return -(-offset // page) * page, end // page * page


def _read_header(path: Path, descriptor: int, size: int) -> tuple[int, bytes]:
    """(length, bytes) of the header. Raises CheckpointError when it cannot be one."""
    start = os.pread(descriptor, 64, 0)
    refuse_foreign(path, start)
    if size < 10:
        raise CheckpointError(f"{path}: has {size} bytes; a safetensors file has at least 10")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header length is {length:,} bytes; expected at most {MAX_HEADER_BYTES:,}"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path}: header length is {length:,} bytes; the file has {size - 8:,} after it"
        )
    text = os.pread(descriptor, length, 8)
    if len(text) != length:
        raise CheckpointError(f"{path}: header has {len(text):,} bytes; expected {length:,}")
    return length, text


def parse_header(text: bytes, data_start: int, size: int, path: Path) -> dict[str, Entry]:
    """The tensors that a header lists, each checked, and all of them together against the file's size.

    data_start: offset of the first byte after the header. Raises CheckpointError.
    """
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: header begins with {text[:1]!r}; expected '{{'")
    table = parse_json_object(text, f"{path}: header")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    entries = {name: _parse_entry(name, value, data_start, path) for name, value in table.items()}
    _check_layout(entries, data_start, size, path)
    return entries


def _parse_entry(name: str, value: object, data_start: int, path: Path) -> Entry:
    where = f"{path}: tensor {shorten(name)}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is a JSON {type(value).__name__}; expected an object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in value:
            raise CheckpointError(f"{where}: has no {key}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CheckpointError(f"{where}: dtype is {shorten(dtype)}; expected one of {', '.join(_DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(axis) for axis in shape):
        raise CheckpointError(
            f"{where}: shape is {shorten(shape)}; "
            f"expected a list of at most {MAX_RANK} whole numbers from 0 to 2**63 - 1"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(
            f"{where}: data_offsets is {shorten(offsets)}; expected two whole numbers from 0 to 2**63 - 1"
        )
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets is {offsets}; the end lies before the beginning")
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: data_offsets give {end - begin:,} bytes; {dtype} {shape} has {shorten(-(-bits // 8))}"
        )
    return Entry(dtype, tuple(shape), data_start + begin, end - begin)


def _is_size(value: object) -> bool:
    # bool is an int to Python, not to the format.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_layout(entries: Mapping[str, Entry], data_start: int, size: int, path: Path) -> None:
    """The tensors must cover the bytes from data_start to the end of the file, each byte once."""
    position = data_start
    previous = "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        end = entry.offset + entry.nbytes
        where = f"{path}: tensor {shorten(name)}"
        if end > size:
            raise CheckpointError(f"{where}: ends at byte {end:,}; the file has {size:,} (truncated?)")
        if entry.offset < position:
            raise CheckpointError(
                f"{where}: begins at byte {entry.offset:,} and overlaps {previous}, "
                f"which ends at {position:,}"
            )
        if entry.offset > position:
            raise CheckpointError(
                f"{where}: begins at byte {entry.offset:,} and leaves a hole after {previous}, "
                f"which ends at {position:,}"
            )
        position, previous = end, f"tensor {shorten(name)}"
    if position != size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {position:,}; the file has {size:,} (trailing bytes)"
        )


def write_safetensors(path: Path, tensors: Iterable[tuple[str, str, npt.NDArray[Any]]]) -> None:
    """Write (name, dtype, array) in the order given; the arrays hold the dtype's bytes (BF16 as uint16).

    Written to a temporary name beside the file and renamed, so that a file that somebody has mapped is never
    cut. Raises OSError.
    """
    listed = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, array in listed:
        assert array.dtype == np.dtype(_NUMPY_DTYPE[dtype]), f"{name}: {array.dtype} does not hold {dtype}"
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces up to a multiple of 8, so that the tensors are aligned.
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, _, array in listed:
                file.write(np.ascontiguousarray(array).data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
