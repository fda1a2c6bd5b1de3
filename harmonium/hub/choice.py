"""Which files of a repository make a model that we can run; what else it is, where it is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harmonium.checkpoint.files import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, shorten
from harmonium.checkpoint.shards import CONFIG_NAME, INDEX_NAME
from harmonium.errors import HubError
from harmonium.hub.listing import RemoteFile, RemoteModel
from harmonium.hub.web import Web

ORIGINAL = "original/"
MODEL_TYPE = "gpt_oss"
_SINGLE_NAME = "model.safetensors"


def choose_files(web: Web, model: RemoteModel, original: bool) -> list[RemoteFile]:
    """config.json, the index and the weights of one layout; the vocabulary is built in, so no more is needed.

    original: OpenAI's layout, which lies in a folder `original`; also taken where there is no other.
    config.json and the index are read to see what they say. Raises HubError: no such layout, not a gpt-oss,
    a file that the index names and nobody has; Refusal and Unreachable.
    """
    files = model.files
    folder = ORIGINAL if original or not _has_weights(files, "") else ""
    if folder + CONFIG_NAME not in files or not _has_weights(files, folder):
        raise HubError(_no_checkpoint(model, original))
    config = _read(web, files[folder + CONFIG_NAME], MAX_CONFIG_BYTES)
    kind = config.get("model_type")
    if not folder and kind != MODEL_TYPE:
        named = config.get("architectures")
        also = f" ({shorten(named[0])})" if isinstance(named, list) and named else ""
        raise HubError(f"{model.name} is a model of type {shorten(kind)}{also}; expected {MODEL_TYPE!r}")
    names = _weights(web, model, folder)
    small = [name for name in (CONFIG_NAME, INDEX_NAME) if folder + name in files]
    return [files[folder + name] for name in (*small, *names)]


def _has_weights(files: Mapping[str, RemoteFile], folder: str) -> bool:
    return any(_is_weight(path, folder) for path in files)


def _is_weight(path: str, folder: str) -> bool:
    name = path.removeprefix(folder)
    return path.startswith(folder) and "/" not in name and name.endswith(".safetensors")


def _weights(web: Web, model: RemoteModel, folder: str) -> list[str]:
    """The same precedence as shards.find_shards has: one file, what the index names, everything."""
    files = model.files
    if folder + _SINGLE_NAME in files:
        return [_SINGLE_NAME]
    if folder + INDEX_NAME not in files:
        return sorted(path.removeprefix(folder) for path in files if _is_weight(path, folder))
    weight_map = _read(web, files[folder + INDEX_NAME], MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise HubError(f"{model.name}: {folder}{INDEX_NAME} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    lost = [name for name in names if folder + name not in files]
    if lost or not names:
        raise HubError(
            f"{model.name}: {folder}{INDEX_NAME} names {shorten((lost or ['no file'])[0])}, "
            "which is not there"
        )
    return names


def _read(web: Web, file: RemoteFile, max_bytes: int) -> dict[str, Any]:
    try:
        table = json.loads(web.text(file.url, max_bytes))
    except (ValueError, RecursionError):
        raise HubError(f"{file.path}: is not JSON") from None
    if not isinstance(table, dict):
        raise HubError(f"{file.path}: holds a JSON {type(table).__name__}; expected an object")
    return table


def _no_checkpoint(model: RemoteModel, original: bool) -> str:
    names = sorted(model.files)
    gguf = [name for name in names if name.endswith(".gguf")]
    if original and _has_weights(model.files, ""):
        return f"{model.name} has no {ORIGINAL}*.safetensors, OpenAI's layout; leave --original out"
    if gguf:
        return (
            f"{model.name} holds GGUF files, such as {gguf[0]}; expected config.json and *.safetensors. A "
            "GGUF file of a gpt-oss that is on this machine is run by giving its path"
        )
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{model.name} has no config.json with *.safetensors beside it; it has {some or 'no files'}"
