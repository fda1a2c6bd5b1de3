"""GGUF files that other programs keep: Ollama's models by name, LM Studio's by folder.

`ollama:gpt-oss:20b` is looked up in Ollama's store: a manifest (manifests/HOST/NAMESPACE/MODEL/TAG) names the
blob that is the model. `lmstudio:PUBLISHER/MODEL` is a folder of LM Studio's. Both are used where they lie.

Source: ollama/ollama:types/model/name.go, manifest/paths.go and envconfig (OLLAMA_MODELS), by behavior; LM
Studio's documentation of its models folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from harmonium.checkpoint.files import MAX_CONFIG_BYTES, read_json_object, shorten
from harmonium.config import environment_text
from harmonium.errors import CheckpointError, ConfigError
from harmonium.text_file import expand_home

OLLAMA, LM_STUDIO = "ollama:", "lmstudio:"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MODEL_LAYER = "application/vnd.ollama.image.model"


def find_elsewhere(word: str) -> Path | None:
    """The file or folder that an `ollama:` or `lmstudio:` word means; None for other words.

    Raises ConfigError when the program has no such model, CheckpointError for a store that is damaged.
    """
    if word.startswith(OLLAMA):
        return _ollama(word.removeprefix(OLLAMA))
    if word.startswith(LM_STUDIO):
        return _lm_studio(word.removeprefix(LM_STUDIO))
    return None


def _ollama(name: str) -> Path:
    path, _, tag = name.partition(":")
    parts = path.split("/")
    tag = tag or "latest"
    if len(parts) > 3 or not all(_PART.fullmatch(part) and ".." not in part for part in (*parts, tag)):
        raise ConfigError(f"{OLLAMA}{name} names no model; expected such as ollama:gpt-oss:20b")
    defaults = ("registry.ollama.ai", "library")
    full = (*defaults[: 3 - len(parts)], *parts)
    given = environment_text("OLLAMA_MODELS")
    homes = ["~/.ollama/models", "/usr/share/ollama/.ollama/models", "/var/lib/ollama/.ollama/models"]
    stores = [expand_home(given)] if given else [expand_home(home) for home in homes]
    for store in stores:
        manifest = store.joinpath("manifests", *full, tag)
        if manifest.is_file():
            return _blob(store, manifest)
    searched = ", ".join(map(str, stores))
    raise ConfigError(
        f"Ollama has no model {'/'.join(parts)}:{tag} in {searched} (`ollama list` shows what there is; "
        "OLLAMA_MODELS names another store)"
    )


def _blob(store: Path, manifest: Path) -> Path:
    layers = read_json_object(manifest, MAX_CONFIG_BYTES).get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict) and layer.get("mediaType") == _MODEL_LAYER:
            match = _DIGEST.fullmatch(str(layer.get("digest")))
            if match is None:
                raise CheckpointError(
                    f"{manifest}: digest is {shorten(layer.get('digest'))}; expected sha256:..."
                )
            blob = store / "blobs" / f"sha256-{match[1]}"
            if not blob.is_file():
                raise CheckpointError(
                    f"{blob}: is not there, though {manifest} names it; pull it again with Ollama"
                )
            return blob
    raise CheckpointError(f"{manifest}: names no layer of type {_MODEL_LAYER}")


def _lm_studio(name: str) -> Path:
    parts = name.split("/")
    if not 1 <= len(parts) <= 3 or not all(_PART.fullmatch(part) and ".." not in part for part in parts):
        raise ConfigError(f"{LM_STUDIO}{name} names no model; expected such as lmstudio:PUBLISHER/MODEL")
    homes = [expand_home("~/.lmstudio/models"), expand_home("~/.cache/lm-studio/models")]
    for home in homes:
        if home.joinpath(*parts).exists():
            return home.joinpath(*parts)
    raise ConfigError(f"LM Studio has no {name} in {' or '.join(map(str, homes))}")
