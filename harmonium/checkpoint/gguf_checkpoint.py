"""`open_gguf`: GGUF files of a gpt-oss -> a Checkpoint whose tensors have their canonical names.

Experts are views of the map in ggml's blocks (`ggml_experts`): the kernels put them in order on the way. BF16
matrices are views too. Other types are decoded to bf16 when they are asked for, in memory of their own: exact
for what a converter stored as F32 or F16 from bf16, the nearest bf16 for Q8_0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.checkpoint import Checkpoint, TensorInfo
from harmonium.checkpoint.config_json import CheckpointConfig
from harmonium.checkpoint.files import shorten
from harmonium.checkpoint.gguf import MAGIC, GgufFile, GgufTensor
from harmonium.checkpoint.gguf_blocks import split_mxfp4, to_bfloat16
from harmonium.checkpoint.gguf_names import Metadata, read_model, stored_names
from harmonium.checkpoint.names import EMBEDDING, UNEMBEDDING, canonical_tensors
from harmonium.checkpoint.safetensors import Advice
from harmonium.errors import CheckpointError

U8 = npt.NDArray[np.uint8]

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")
_PACKED = ("MXFP4", "MXFP4_PAIRS")
_PLAIN = ("BF16", "F16", "F32", "Q8_0")


@dataclass(frozen=True, slots=True)
class GgmlExperts:
    """One matrix of all experts of a layer: views [E, rows, 17 * blocks].

    second: None, or the rows that come in turn with those of `first` (gate, up, gate, ...). is_split: whether
    a block's nibbles lie in ggml's order. names: stored ones, for `advise`.
    """

    first: U8
    second: U8 | None
    is_split: bool
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stored tensor lies, or rows of it."""

    file: GgufFile
    tensor: GgufTensor
    first_row: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> U8:
        """Bytes of the rows, a view."""
        rows = self.file.view(self.tensor)
        return rows[self.first_row : self.first_row + self.shape[0]] if len(self.shape) == 2 else rows

    @property
    def span(self) -> tuple[int, int]:
        """(offset, bytes) in the file."""
        num_rows = self.tensor.shape[0] if self.tensor.shape else 1
        row_bytes = self.tensor.nbytes // num_rows
        return self.tensor.offset + self.first_row * row_bytes, self.shape[0] * row_bytes


class GgufCheckpoint(Checkpoint):
    """A Checkpoint over GGUF files. Blocks and scales of experts can be asked for, and are copies then."""

    def __init__(self, path: Path, files: list[GgufFile]) -> None:
        """Use `open_gguf`. Raises CheckpointError."""
        self._gguf = files
        self._stored = _all_tensors(files)
        metadata = Metadata(files[0].metadata, str(files[0].path))
        self._refuse_fused_experts(metadata.architecture)
        config = CheckpointConfig(read_model(metadata, self._vocabulary(metadata)), "huggingface", False)
        super().__init__(path, config, "mxfp4", {}, {}, ())
        self.layout = "gguf"
        self._places: dict[str, _Place] = {}
        tensors = {}
        for name, dtype, shape in canonical_tensors(self.config, "mxfp4"):
            place = self._find(name, shape)
            nbytes = int(np.prod(shape)) * (2 if dtype == "BF16" else 1)
            tensors[name] = TensorInfo(dtype, shape, nbytes, place.file.path, place.span[0])
        self.tensors = tensors
        used = {id(place.tensor) for place in self._places.values()}
        self.ignored = tuple(sorted(name for name, (_, t) in self._stored.items() if id(t) not in used))
        self._refuse_more_layers()
        general = metadata.table.get("general.name")
        self.general_name = general if isinstance(general, str) else None

    def _refuse_fused_experts(self, architecture: object) -> None:
        """Ollama's files have gate and up in turn; llama.cpp, where it fuses them, one above the other."""
        fused = [name for name in self._stored if "ffn_gate_up_exps" in name]
        if fused and architecture == "gpt-oss":
            raise CheckpointError(
                f"{self._stored[fused[0]][0].path}: tensor {fused[0]!r} has gate and up in one, in an order "
                "that the architecture 'gpt-oss' leaves open; convert again without --fuse-gate-up-exps"
            )

    def _vocabulary(self, metadata: Metadata) -> int:
        """Rows of the embedding, which must be as many as tokens are listed."""
        [stored] = stored_names(EMBEDDING)
        if stored not in self._stored or len(self._stored[stored][1].shape) != 2:
            raise CheckpointError(f"{metadata.where}: tensor {stored!r} is missing; expected [tokens, width]")
        rows = self._stored[stored][1].shape[0]
        if metadata.vocabulary_size not in (None, rows):
            raise CheckpointError(
                f"{metadata.where}: lists {metadata.vocabulary_size:,} tokens; {stored} has {rows:,} rows"
            )
        return rows

    def _find(self, name: str, shape: tuple[int, ...]) -> _Place:
        """Look for what a canonical tensor is made of, and check it."""
        if ".experts." in name:
            return self._find_experts(name, shape)
        part, _, kind = name.rpartition(".")
        if part[-1:] in "qkv" and part.endswith((".q", ".k", ".v")) and self._get(name) is None:
            config = self.config
            q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
            fused = f"{part[:-1]}qkv.{kind}"
            row = {"q": 0, "k": q, "v": q + kv}[part[-1]]
            return self._place(name, fused, shape, (q + 2 * kv, *shape[1:]), row, _PLAIN)
        if name == UNEMBEDDING and self._get(name) is None:
            return self._place(name, EMBEDDING, shape, shape, 0, _PLAIN)
        return self._place(name, name, shape, shape, 0, _PLAIN)

    def _find_experts(self, name: str, shape: tuple[int, ...]) -> _Place:
        """gate_up is one tensor or two; blocks and scales are one tensor in the file."""
        base = name.removesuffix(".blocks").removesuffix(".scales")
        is_matrix = base != name
        if is_matrix:
            blocks = shape[2]
            shape = (shape[0], shape[1], 32 * blocks)
        types = _PACKED if is_matrix else _PLAIN
        if "gate_up" in base and self._get(base) is None:
            half = (shape[0], shape[1] // 2, *shape[2:])
            self._place(base.replace("gate_up", "up"), base.replace("gate_up", "up"), half, half, 0, types)
            base = base.replace("gate_up", "gate")
            return self._place(base, base, half, half, 0, types)
        return self._place(base, base, shape, shape, 0, types)

    def _get(self, name: str) -> tuple[GgufFile, GgufTensor] | None:
        return next((self._stored[stored] for stored in stored_names(name) if stored in self._stored), None)

    def _place(
        self,
        key: str,
        name: str,
        shape: tuple[int, ...],
        stored_shape: tuple[int, ...],
        first_row: int,
        types: tuple[str, ...],
    ) -> _Place:
        found = self._get(name)
        wanted = next(stored_names(name))
        where = self._gguf[0].path
        if found is None:
            raise CheckpointError(f"{where}: tensor {wanted!r} is missing; expected {list(stored_shape)}")
        file, tensor = found
        if tensor.shape != stored_shape:
            raise CheckpointError(
                f"{file.path}: tensor {wanted!r} has shape {list(tensor.shape)}; the metadata make it "
                f"{list(stored_shape)}"
            )
        if tensor.type.name not in types:
            raise CheckpointError(
                f"{file.path}: tensor {wanted!r} has type {tensor.type.name}; expected {' or '.join(types)}"
            )
        self._places[key] = place = _Place(file, tensor, first_row, shape)
        return place

    def _refuse_more_layers(self) -> None:
        matches = (_BLOCK.match(name) for name in self._stored)
        highest = max((int(match[1]) for match in matches if match), default=-1)
        if highest >= self.config.num_layers:
            raise CheckpointError(
                f"{self.path}: holds layer {highest}; its block_count is {self.config.num_layers}"
            )

    @property
    def name(self) -> str:
        """The file's, or for a file that is named after its checksum what its metadata say."""
        if self.path.suffix == ".gguf":
            match = _SPLIT.fullmatch(self.path.name)
            return match[1] if match else self.path.stem
        return self.general_name or self.path.name

    @property
    def dense_type(self) -> str:
        """The ggml type of the unembedding, which the other dense matrices nearly always share."""
        return self._places[UNEMBEDDING].tensor.type.name

    def stored_rows(self, name: str) -> tuple[U8, str]:
        """(bytes of the rows as they lie, a view; the ggml type) of a tensor that is no expert's."""
        place = self._places[name]
        return place.rows, place.tensor.type.name

    def ggml_experts(self, name: str) -> GgmlExperts:
        """Of a matrix such as "layers.0.experts.gate_up". Raises CheckpointError when closed."""
        first = self._places.get(name)
        second = None
        names: tuple[str, ...] = (name,)
        if first is None:
            names = (name.replace("gate_up", "gate"), name.replace("gate_up", "up"))
            first, second = (self._places[half] for half in names)
            if first.tensor.type is not second.tensor.type:
                raise CheckpointError(f"{self.path}: gate and up of {name} have two types; expected one")
        is_split = first.tensor.type.name == "MXFP4"
        return GgmlExperts(first.rows, None if second is None else second.rows, is_split, names)

    def expert_span(self, name: str) -> tuple[Path, int, int]:
        """(file, offset, bytes) of all experts' matrix of a name that `ggml_experts` gave."""
        place = self._places[name]
        return place.file.path, *place.span

    def tensor(self, name: str) -> npt.NDArray[Any]:
        self._info(name)
        base, _, kind = name.rpartition(".")
        if kind in ("blocks", "scales"):
            experts = self.ggml_experts(base)
            halves = [experts.first] if experts.second is None else [experts.first, experts.second]
            parts = [split_mxfp4(half, experts.is_split)[kind == "scales"] for half in halves]
            return parts[0] if len(parts) == 1 else _in_turn(*parts)
        if name not in self._places:  # the bias of gate_up, in two tensors
            return _in_turn(*(self._plain(name.replace("gate_up", half)) for half in ("gate", "up")))
        return self._plain(name)

    def _plain(self, name: str) -> npt.NDArray[np.uint16]:
        place = self._places[name]
        rows = place.rows
        if len(place.shape) == 1 and place.shape != place.tensor.shape:  # a part of a fused bias
            size = place.tensor.type.size
            rows = rows[place.first_row * size : (place.first_row + place.shape[0]) * size]
        bits = to_bfloat16(rows, place.tensor.type.name).reshape(place.shape)
        bits.flags.writeable = False
        return bits

    def advise(self, names: str | Iterable[str], advice: Advice) -> None:
        for name in (names,) if isinstance(names, str) else names:
            place = self._places[name]
            place.file.advise(advice, *place.span)

    def fingerprint(self) -> str:
        digest = blake2b(repr(self.config).encode(), digest_size=16)
        for name in sorted(self._stored):
            file, tensor = self._stored[name]
            digest.update(f"{name} {tensor.type.name} {tensor.shape}".encode())
            values = file.view(tensor).reshape(-1)
            digest.update(values[len(values) // 2 :][:1024].tobytes())
        return digest.hexdigest()

    def check_sizes(self) -> None:
        for file in self._gguf:
            file.check_size()

    def close(self) -> None:
        for file in self._gguf:
            file.close()


def _in_turn(gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[E, F, ...] twice -> [E, 2F, ...] with their rows in turn."""
    stacked = np.stack((gate, up), axis=2)
    return stacked.reshape(gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])


def _all_tensors(files: list[GgufFile]) -> dict[str, tuple[GgufFile, GgufTensor]]:
    table: dict[str, tuple[GgufFile, GgufTensor]] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in table:
                raise CheckpointError(
                    f"{file.path}: tensor {shorten(name)} is in {table[name][0].path.name} too"
                )
            table[name] = (file, tensor)
    return table


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that is meant: the file, or the only one (or set) of a folder with no safetensors.

    Raises CheckpointError when a folder has several.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                return path if file.read(4) == MAGIC else None
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    except OSError:
        return None  # whoever opens the path says it better
    if any(name.endswith(".safetensors") for name in names):
        return None
    models = [name for name in names if name.endswith(".gguf") and not name.startswith("mmproj")]
    firsts = [name for name in models if (match := _SPLIT.fullmatch(name)) is None or int(match[2]) == 1]
    if len(firsts) > 1:
        raise CheckpointError(
            f"{path}: holds several GGUF files, such as {', '.join(firsts[:3])}; give one of them"
        )
    return path / (firsts or models)[0] if models else None


def open_gguf(path: Path) -> GgufCheckpoint:
    """Open a GGUF file, or all parts of a split one, and check it whole. Raises CheckpointError."""
    files = [GgufFile(part) for part in _parts(path)]
    return GgufCheckpoint(path, files)


def _parts(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{part:05d}-of-{match[3]}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing or not parts:
        lacking = ", ".join(missing[:3]) or "every part"
        raise CheckpointError(f"{path}: {lacking} is not there; is the download complete?")
    return parts
