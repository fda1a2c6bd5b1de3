"""Weights that are on this machine already: Hugging Face's cache and ModelScope's, used where they lie.

Source of the layouts: huggingface_hub's guide to its cache; the package modelscope-hub 0.5.1 (_download.py),
which also says where its predecessors kept things.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from harmonium.checkpoint.shards import find_folder, find_shards
from harmonium.errors import HarmoniumError
from harmonium.hub.names import HubName, is_openai, twin
from harmonium.hub.settings import HubSettings
from harmonium.hub.stores import repository_folder

_COMMIT = re.compile(r"[0-9a-f]{40}")
_COUNTED = re.compile(r"-of-0*(\d+)\.safetensors$")


def find_local(name: HubName, settings: HubSettings, original: bool = False) -> Path | None:
    """The folder of a whole model on this machine, or None.

    A model of OpenAI's without a revision is also taken from the other hub's cache: they are the same files.
    original: OpenAI's layout is wanted.
    """
    names = [name, twin(name)] if is_openai(name) and name.revision is None else [name]
    for candidate in names:
        for folder in _folders(candidate, settings):
            wanted = folder / "original" if original else folder
            if is_whole(wanted):
                return wanted
    return None


def is_whole(folder: Path) -> bool:
    """Whether config.json and every weight file that must be there are; opening checks what is in them."""
    try:
        found = find_folder(folder)
        shards = list(find_shards(found))
    except HarmoniumError:
        return False
    if not (found / "config.json").is_file() or not all(shard.is_file() for shard in shards):
        return False
    # Without an index, names such as model-00001-of-00003.safetensors say how many there are.
    counted = [match for match in (_COUNTED.search(shard.name) for shard in shards) if match]
    return all(int(match[1]) == len(shards) for match in counted)


def _folders(name: HubName, settings: HubSettings) -> Iterator[Path]:
    """Where a hub's own programs, and we, would have put it; what exists is not looked at."""
    if name.source == "huggingface":
        yield from _snapshot(repository_folder(settings.huggingface_cache, name), name.revision)
        return
    owner, model = name.repo.split("/")
    base = settings.modelscope_cache
    yield modelscope_folder(base, name)
    if name.revision is None:
        for root in (base, base / "hub"):
            yield root / "models" / owner / model.replace(".", "___")
            yield root / "models" / owner / model


def modelscope_folder(cache: Path, name: HubName) -> Path:
    """Of a revision in ModelScope's cache."""
    return cache / "models" / name.repo.replace("/", "--") / "snapshots" / (name.revision or "master")


def _snapshot(repository: Path, revision: str | None) -> Iterator[Path]:
    if revision is not None and _COMMIT.fullmatch(revision):
        yield repository / "snapshots" / revision
        return
    try:
        commit = (repository / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return
    if _COMMIT.fullmatch(commit):
        yield repository / "snapshots" / commit
