"""`open_checkpoint`: a folder on disk -> a model's config and its tensors under their canonical names.

Opening reads headers only; weights are mapped and come into memory when somebody touches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.config_json import CheckpointConfig, Layout, read_config
from harmonium.checkpoint.files import shorten
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.names import (
    EMBEDDING,
    UNEMBEDDING,
    ExpertFormat,
    Source,
    find_expert_format,
    highest_layer,
    stored_name,
    tensor_sources,
)
from harmonium.checkpoint.safetensors import Advice, Entry, SafetensorsFile
from harmonium.checkpoint.shards import CONFIG_NAME, INDEX_NAME, find_folder, find_shards, model_name
from harmonium.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a canonical tensor lies. dtype: "BF16" or "U8"; offset: of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


class Checkpoint:
    """An open checkpoint: read-only views of the mapped files.

    path: the folder that the files lie in, or the GGUF file. layout: "huggingface", "original" or "gguf".
    expert_format: "mxfp4" or "bf16" (then the experts lie as [E, in, out]). tensors: canonical name ->
    TensorInfo, see names.py. ignored: stored names that no part of the model uses, sorted.
    """

    def __init__(
        self,
        path: Path,
        config: CheckpointConfig,
        expert_format: ExpertFormat,
        tensors: Mapping[str, TensorInfo],
        files: Mapping[Path, SafetensorsFile],
        ignored: tuple[str, ...],
    ) -> None:
        """Use `open_checkpoint`."""
        self.path = path
        self.config: ModelConfig = config.model
        self.layout: Layout | Literal["gguf"] = config.layout
        self.expert_format: ExpertFormat = expert_format
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.ignored = ignored
        self._files = files

    @property
    def name(self) -> str:
        """What to call the model: its folder's name, in a cache of downloads the repository's."""
        return model_name(self.path)

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A read-only view: bf16 as its bits in uint16, MXFP4 blocks and scales as uint8.

        The view stays valid after `close`. Raises CheckpointError for a name that the model does not have and
        when the checkpoint has been closed.
        """
        info = self._info(name)
        return self._files[info.file].view(info.dtype, info.shape, info.offset)

    def advise(self, names: str | Iterable[str], advice: Advice) -> None:
        """Hint to the operating system: tensors will be read soon, or their memory may be taken back.

        After "dontneed" the values are still there; they are read again when somebody touches them.
        """
        for name in (names,) if isinstance(names, str) else names:
            info = self._info(name)
            self._files[info.file].advise(advice, info.offset, info.nbytes)

    def give_back(self, name: str, index: int) -> None:
        """As advise(name, "dontneed"), for one entry of the tensor's first axis."""
        info = self._info(name)
        size = info.nbytes // info.shape[0]
        self._files[info.file].advise("dontneed", info.offset + index * size, size)

    def fingerprint(self) -> str:
        """A name for what it computes: sizes, and a kilobyte of each tensor. A copy has the same."""
        digest = blake2b(repr(self.config).encode(), digest_size=16)
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            values = self.tensor(name).reshape(-1).view(np.uint8)
            digest.update(values[len(values) // 2 :][:1024].tobytes())
        return digest.hexdigest()

    def check_sizes(self) -> None:
        """Raise CheckpointError when a file was shortened since it was opened: reading could be fatal."""
        for file in self._files.values():
            file.check_size()

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: the model has no tensor {name!r}")
        return info

    def close(self) -> None:
        """Let go of the files. Views that exist stay valid and keep theirs. A second call does nothing."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a gpt-oss checkpoint and check it whole: headers, config, every tensor's name, shape and dtype.

    path: a folder in the Hugging Face or OpenAI's original layout, one that holds the latter as `original/`,
    or a file in such a folder; a GGUF file, or a folder with one and no safetensors. Weights are not read, so
    MXFP4 scales of 255 (NaN) are not looked for.

    Raises ConfigError when there is no such path, CheckpointError for what is wrong with the files.
    """
    from harmonium.checkpoint.gguf_checkpoint import find_gguf, open_gguf  # here: it needs Checkpoint

    gguf = find_gguf(Path(path))
    if gguf is not None:
        return open_gguf(gguf)
    folder = find_folder(Path(path))
    config = read_config(folder / CONFIG_NAME)
    shards = find_shards(folder)
    files: dict[Path, SafetensorsFile] = {}
    stored: dict[str, tuple[SafetensorsFile, Entry]] = {}
    for shard, listed in shards.items():
        file = files[shard] = SafetensorsFile(shard)
        for name in file.entries if listed is None else listed:
            if name not in file.entries:
                raise CheckpointError(
                    f"{shard}: lacks tensor {shorten(name)}, which {INDEX_NAME} says it holds"
                )
            if name in stored:
                raise CheckpointError(
                    f"{shard}: tensor {shorten(name)} is in {stored[name][0].path.name} too"
                )
            stored[name] = (file, file.entries[name])
    expert_format = find_expert_format(stored, config.layout, str(folder))
    _refuse_more_layers(stored, config, folder)
    sources = list(tensor_sources(config.model, config.layout, expert_format))
    tensors = {source.name: _place(source, stored, config, folder) for source in sources}
    ignored = tuple(sorted(set(stored) - {source.stored for source in sources}))
    return Checkpoint(folder, config, expert_format, tensors, files, ignored)


def _place(
    source: Source,
    stored: Mapping[str, tuple[SafetensorsFile, Entry]],
    config: CheckpointConfig,
    folder: Path,
) -> TensorInfo:
    """Check the stored tensor against what the config asks for and say where the canonical one lies."""
    name = source.stored
    if name not in stored and source.name == UNEMBEDDING and config.is_tied:
        name = stored_name(EMBEDDING, config.layout)
    if name not in stored:
        raise CheckpointError(
            f"{folder}: tensor {name!r} is missing; expected {source.dtype} {list(source.stored_shape)}"
        )
    file, entry = stored[name]
    if entry.dtype != source.dtype:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} has dtype {entry.dtype}; expected {source.dtype}"
        )
    if entry.shape != source.stored_shape:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} has shape {list(entry.shape)}; "
            f"{CONFIG_NAME} makes it {list(source.stored_shape)}"
        )
    row_bytes = entry.nbytes // source.stored_shape[0]
    offset = entry.offset + source.first_row * row_bytes
    return TensorInfo(source.dtype, source.shape, source.shape[0] * row_bytes, file.path, offset)


def _refuse_more_layers(stored: Iterable[str], config: CheckpointConfig, folder: Path) -> None:
    # Unknown tensors are ignored, but layers left out would give another model without a word.
    highest = highest_layer(stored, config.layout)
    if highest >= config.model.num_layers:
        raise CheckpointError(
            f"{folder}: holds layer {highest}; {CONFIG_NAME} has num_hidden_layers {config.model.num_layers}"
        )
