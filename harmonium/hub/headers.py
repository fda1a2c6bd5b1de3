"""A model on a hub, as far as headers tell: for `harmonium inspect`, which must not download 13 GB."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harmonium.checkpoint.safetensors import MAX_HEADER_BYTES
from harmonium.checkpoint.shards import CONFIG_NAME, INDEX_NAME
from harmonium.errors import HubError
from harmonium.hub.choice import choose_files
from harmonium.hub.download import PullOptions, explained
from harmonium.hub.listing import RemoteFile, list_model, open_web
from harmonium.hub.names import HubName
from harmonium.hub.settings import HubSettings
from harmonium.hub.web import Web

_MAX_SMALL_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Skeleton:
    """folder: opens as a checkpoint, all zeros. download_bytes: what a pull would fetch."""

    folder: Path
    download_bytes: int


@contextmanager
def skeleton(name: HubName, settings: HubSettings, options: PullOptions | None = None) -> Iterator[Skeleton]:
    """config.json, the index and the headers of the weights in a temporary folder, which goes at the end.

    Raises HubError.
    """
    options = options or PullOptions()
    if settings.is_offline:
        raise HubError(f"{name}: is not here, and HF_HUB_OFFLINE is set; unset it to look at the hub")
    web = open_web(settings, name, options.token, options.patience)
    model = list_model(web, settings, name)
    with tempfile.TemporaryDirectory(prefix="harmonium-inspect-") as folder, explained(name):
        files = choose_files(web, model, options.original)
        for file in files:
            # In one folder whatever the layout: names are unique in it.
            _fetch_head(web, file, Path(folder) / file.path.rpartition("/")[2])
        yield Skeleton(Path(folder), sum(file.size for file in files))


def _fetch_head(web: Web, file: RemoteFile, target: Path) -> None:
    """The whole of a small file; of weights the header, and after it a hole as long as the tensors."""
    if target.name in (CONFIG_NAME, INDEX_NAME):
        target.write_bytes(web.text(file.url, _MAX_SMALL_BYTES))
        return
    start = web.text(file.url, file.size, 0, 8)[:8]
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, file.size - 8):
        raise HubError(f"{file.path}: begins with {start!r}; expected a safetensors header")
    with target.open("wb") as out:
        out.write(web.text(file.url, file.size, 0, 8 + length)[: 8 + length])
        os.ftruncate(out.fileno(), file.size)
