"""Which folder is meant, and which of its files hold the weights."""

from __future__ import annotations

import os
from pathlib import Path

from harmonium.checkpoint.files import (
    MAX_INDEX_BYTES,
    open_regular,
    read_json_object,
    refuse_foreign,
    shorten,
)
from harmonium.errors import CheckpointError, ConfigError

CONFIG_NAME = "config.json"

INDEX_NAME = "model.safetensors.index.json"

_SINGLE_NAME = "model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def find_folder(path: Path) -> Path:
    """The folder whose config.json and weights are meant: the path, its `original`, or the given file's.

    A folder that holds both layouts is read as Hugging Face's. Raises ConfigError when there is nothing at
    the path, CheckpointError for a file or folder that cannot be (part of) a checkpoint.
    """
    try:
        is_folder = path.is_dir()
        if not is_folder and not path.exists():
            raise ConfigError(_missing(path))
        if not is_folder:
            _refuse_file(path)
            path = path.parent
        for folder in (path, path / "original"):
            if (folder / CONFIG_NAME).is_file() and _weight_files(folder):
                return folder
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r}: cannot be looked at ({error})") from None
    if not os.path.lexists(path / CONFIG_NAME):
        raise CheckpointError(_no_config(path))
    return path


def model_name(folder: Path) -> str:
    """What to call a model: the folder's name, in a cache of downloads the repository's (openai/gpt-oss-20b).

    Source of the caches' layout: hub/stores.py and hub/local.py.
    """
    folder = folder.resolve()
    if folder.name == "original":
        folder = folder.parent
    if folder.parent.name == "snapshots":
        repository = folder.parent.parent.name.removeprefix("models--")
        if repository.count("--") == 1:
            return repository.replace("--", "/")
    return folder.name


def find_shards(folder: Path) -> dict[Path, list[str] | None]:
    """The weight files of a folder, each with the tensors that the index says it holds (None: all of them).

    `model.safetensors` alone, or what the index names, or every *.safetensors. Raises CheckpointError.
    """
    if os.path.lexists(folder / _SINGLE_NAME):
        return {folder / _SINGLE_NAME: None}
    if os.path.lexists(folder / INDEX_NAME):
        return _read_index(folder / INDEX_NAME)
    files = _weight_files(folder)
    if files:
        return dict.fromkeys(files)
    names = sorted(file.name for file in _listed(folder))
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(f"{folder / pickles[0]}: pickles are never loaded; expected safetensors files")
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        refuse_foreign(folder / gguf[0], b"GGUF")
    raise CheckpointError(f"{folder}: has no *.safetensors; is the download complete?")


def _read_index(index: Path) -> dict[Path, list[str] | None]:
    """model.safetensors.index.json: an object weight_map from a tensor's name to the file that holds it."""
    weight_map = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map is {shorten(weight_map)}; expected an object of file names"
        )
    tensors: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        # Only the name must stay in the folder. The file may be a link: download caches are made of links.
        if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
            raise CheckpointError(
                f"{index}: tensor {shorten(tensor)} is in {shorten(name)}; "
                "expected the name of a file in this folder"
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {shorten(tensor)} is in {shorten(name)}; expected a .safetensors file"
            )
        tensors.setdefault(name, []).append(tensor)
    for name, listed in tensors.items():
        if not os.path.lexists(index.parent / name):
            raise CheckpointError(
                f"{index}: tensor {shorten(listed[0])} is in {name!r}, which does not exist; "
                "is the download complete?"
            )
    return {index.parent / name: listed for name, listed in tensors.items()}


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error})") from None


def _weight_files(folder: Path) -> list[Path]:
    """Every *.safetensors. Hidden names are temporary files of a writer."""
    return [file for file in _listed(folder) if file.suffix == ".safetensors" and file.name[0] != "."]


def _missing(path: Path) -> str:
    text = str(path)
    if path.is_symlink():
        return f"{text!r} is a link to something that does not exist"
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return (
            f"{text!r} is not a folder here; if you mean the model of that name on a hub, download it first "
            f"(harmonium pull {text} --dir FOLDER) and give the folder"
        )
    return f"{text!r} does not exist; expected the folder of a checkpoint (config.json and *.safetensors)"


def _refuse_file(path: Path) -> None:
    """Say what is wrong with a file given in place of a folder, unless it belongs to a checkpoint."""
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path}: pickles are never loaded; expected a safetensors checkpoint")
    descriptor, _ = open_regular(path)
    try:
        refuse_foreign(path, os.pread(descriptor, 64, 0))
    finally:
        os.close(descriptor)
    if path.suffix not in (".safetensors", ".json"):
        raise CheckpointError(
            f"{path}: is not part of a checkpoint; expected a folder, a .safetensors or a .json file"
        )


def _no_config(path: Path) -> str:
    snapshots = sorted(path.glob(f"snapshots/*/{CONFIG_NAME}"))
    if snapshots:
        return f"{path}: is a cache of downloads; give the folder {snapshots[-1].parent}"
    return (
        f"{path}: has no {CONFIG_NAME}; expected the folder of a checkpoint (config.json and *.safetensors)"
    )
