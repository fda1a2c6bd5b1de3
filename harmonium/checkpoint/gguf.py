"""GGUF files: header -> metadata and tensors, every number checked before a view of the map is handed out.

A file is: the magic, a version, counts of tensors and of metadata; the metadata, each a name, a type and a
value; for each tensor a name, its axes (fastest first), a type and an offset; padding; the tensors.

Source: the GGUF specification, ggml-org/ggml:docs/gguf.md; sizes of types: ggml/src/ggml-common.h.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.files import open_regular, shorten
from harmonium.checkpoint.safetensors import Advice, page_span
from harmonium.errors import CheckpointError

MAGIC = b"GGUF"

_MAX_ENTRIES = 1 << 17
"""Of metadata or tensors; a gpt-oss-120b has 700 tensors."""

_MAX_NAME_BYTES = 1 << 16
_MAX_AXES = 4

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorType:
    """A ggml type: `block` numbers take `size` bytes."""

    name: str
    block: int
    size: int


TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    # Ollama's first gpt-oss files gave MXFP4 the number of a type that ggml had dropped, with other nibbles.
    4: TensorType("MXFP4_PAIRS", 32, 17),
    8: TensorType("Q8_0", 32, 34),
    30: TensorType("BF16", 1, 2),
    39: TensorType("MXFP4", 32, 17),
}

_OTHER_TYPES = dict(
    zip(
        (2, 3, 6, 7, 10, 11, 12, 13, 14),
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        strict=True,
    )
)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """shape: slowest axis first, as in NumPy. offset: of its first byte in the file. type: a key of TYPES."""

    type: TensorType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata, which is passed over: its number of values."""

    length: int


class _Cursor:
    """Reads a header from a map, front to back; a length that leads out of the file is an error."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self.position = 0

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {text}")

    def take(self, count: int) -> int:
        """Go on by so many bytes; where they begin."""
        start = self.position
        if count > len(self._data) - start:
            raise self.error(f"ends at byte {len(self._data):,} inside its header (truncated?)")
        self.position = start + count
        return start

    def scalar(self, form: str) -> Any:
        start = self.take(struct.calcsize(form))
        return struct.unpack_from(form, self._data, start)[0]

    def text(self, what: str, max_bytes: int = _MAX_NAME_BYTES) -> str:
        length = self.scalar("<Q")
        if length > max_bytes:
            raise self.error(f"{what} has {length:,} bytes; expected at most {max_bytes:,}")
        start = self.take(length)
        try:
            return self._data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def value(self, name: str) -> Any:
        kind = self.scalar("<I")
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text(f"metadata {name!r}", max_bytes=1 << 24)
        if kind == _ARRAY:
            return self._array(name)
        raise self.error(f"metadata {name!r} has type {kind}; expected 0 to 12")

    def _array(self, name: str) -> GgufArray:
        kind, length = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            self.take(length * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            self._pass_strings(length)
        else:
            raise self.error(f"metadata {name!r} is an array of type {kind}; expected numbers or strings")
        return GgufArray(length)

    def _pass_strings(self, count: int) -> None:
        """A vocabulary has 650,000 of them in all, so this loop is kept short."""
        data, position, size = self._data, self.position, len(self._data)
        unpack = struct.Struct("<Q").unpack_from
        if count > size // 8:
            raise self.error(f"an array has {count:,} strings, more than the file has room for")
        for _ in range(count):
            if position + 8 > size:
                raise self.error("ends inside an array of strings (truncated?)")
            position += 8 + unpack(data, position)[0]
        if position > size:
            raise self.error("ends inside an array of strings (truncated?)")
        self.position = position


class GgufFile:
    """One mapped file. metadata: name -> number, text or GgufArray; tensors: name -> GgufTensor."""

    def __init__(self, path: Path) -> None:
        """Open, map and check. Raises CheckpointError."""
        self.path = path
        descriptor, size = open_regular(path)
        try:
            if size < 24 or os.pread(descriptor, 4, 0) != MAGIC:
                raise CheckpointError(f"{path}: is no GGUF file (begins with {os.pread(descriptor, 4, 0)!r})")
            self._map: mmap.mmap | None = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped into memory ({error})") from None
        finally:
            os.close(descriptor)
        cursor = _Cursor(self._map, path)
        num_tensors, num_metadata = self._counts(cursor)
        self.metadata: Mapping[str, Any] = self._read_metadata(cursor, num_metadata)
        self.tensors: Mapping[str, GgufTensor] = self._read_tensors(cursor, num_tensors, size)

    def _counts(self, cursor: _Cursor) -> tuple[int, int]:
        cursor.take(4)
        version = cursor.scalar("<I")
        if version not in (2, 3):
            swapped = "; it is big-endian" if version in (2 << 24, 3 << 24) else ""
            raise cursor.error(f"has GGUF version {version:,}; expected 2 or 3{swapped}")
        counts = cursor.scalar("<Q"), cursor.scalar("<Q")
        for count, what in zip(counts, ("tensors", "metadata entries"), strict=True):
            if count > _MAX_ENTRIES:
                raise cursor.error(f"says it has {count:,} {what}; expected at most {_MAX_ENTRIES:,}")
        return counts

    def _read_metadata(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for _ in range(count):
            name = cursor.text("a name of metadata")
            if name in table:
                raise cursor.error(f"metadata {shorten(name)} occurs twice")
            table[name] = cursor.value(name)
        return table

    def _read_tensors(self, cursor: _Cursor, count: int, size: int) -> dict[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment is {shorten(alignment)}; expected a power of two")
        listed = [self._read_tensor(cursor) for _ in range(count)]
        start = -(-cursor.position // alignment) * alignment
        table: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in listed:
            nbytes = math.prod(shape) // kind.block * kind.size
            if offset % alignment:
                raise cursor.error(f"tensor {shorten(name)}: offset {offset:,} is no multiple of {alignment}")
            if start + offset + nbytes > size:
                raise cursor.error(
                    f"tensor {shorten(name)}: ends at byte {start + offset + nbytes:,}; the file has "
                    f"{size:,} (truncated?)"
                )
            if name in table:
                raise cursor.error(f"tensor {shorten(name)} occurs twice")
            table[name] = GgufTensor(kind, shape, start + offset, nbytes)
        _refuse_overlaps(table, self.path)
        return table

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
        name = cursor.text("a name of a tensor")
        num_axes = cursor.scalar("<I")
        if num_axes > _MAX_AXES:
            raise cursor.error(f"tensor {shorten(name)}: has {num_axes:,} axes; expected up to {_MAX_AXES}")
        shape = tuple(cursor.scalar("<Q") for _ in range(num_axes))[::-1]
        kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        if math.prod(shape) >= 1 << 48:
            raise cursor.error(
                f"tensor {shorten(name)}: has shape {shorten(list(shape))}, which no file holds"
            )
        if kind not in TYPES:
            known = ", ".join(sorted({known.name.removesuffix("_PAIRS") for known in TYPES.values()}))
            named = _OTHER_TYPES.get(kind, f"number {kind}")
            raise cursor.error(
                f"tensor {shorten(name)}: has ggml type {named}; expected one of {known}. The experts "
                "of gpt-oss are published in MXFP4: a file that was quantized again only loses by it"
            )
        if shape and shape[-1] % TYPES[kind].block:
            raise cursor.error(
                f"tensor {shorten(name)}: rows have {shape[-1]:,} numbers; "
                f"{TYPES[kind].name} takes 32 at a time"
            )
        return name, TYPES[kind], shape, offset

    def view(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Read-only bytes of a tensor: [..., bytes of a row]. Raises CheckpointError as `check_size` does."""
        self.check_size()
        assert self._map is not None, "check_size refuses a closed file"
        row_bytes = (
            tensor.shape[-1] // tensor.type.block * tensor.type.size if tensor.shape else tensor.nbytes
        )
        flat: npt.NDArray[np.uint8] = np.frombuffer(
            self._map, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset
        )
        return flat.reshape(*tensor.shape[:-1], row_bytes)

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
        """What SafetensorsFile.advise does."""
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


def _refuse_overlaps(tensors: Mapping[str, GgufTensor], path: Path) -> None:
    end, previous = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise CheckpointError(
                f"{path}: tensor {shorten(name)}: begins at byte {tensor.offset:,} and overlaps "
                f"{shorten(previous)}, which ends at {end:,}"
            )
        end, previous = tensor.offset + tensor.nbytes, name
