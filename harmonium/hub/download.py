"""`pull`: a model from a hub onto this machine, whole and checked, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from harmonium.checkpoint import open_checkpoint
from harmonium.errors import HubError
from harmonium.hub.choice import choose_files
from harmonium.hub.listing import RemoteFile, RemoteModel, explain, list_model, open_web
from harmonium.hub.local import modelscope_folder
from harmonium.hub.lock import locked
from harmonium.hub.names import HubName
from harmonium.hub.notices import Say, download_bar, say, size_text
from harmonium.hub.part_file import PartFile
from harmonium.hub.settings import HubSettings
from harmonium.hub.stores import CacheStore, FolderStore, Store
from harmonium.hub.transfer import Transfer
from harmonium.hub.web import Patience, Refusal, Unreachable, Web

NUM_CONNECTIONS = 8
"""Requests at a time: a content network gives a single one a fraction of a line."""

_SPARE_BYTES = 64 << 20
"""Left free on the disk, for what else is written meanwhile."""


@dataclass(frozen=True, slots=True)
class PullOptions:
    """original: OpenAI's layout. token: for this download; None: the environment's. folder: a plain folder in
    place of the hub's cache."""

    original: bool = False
    token: str | None = None
    folder: Path | None = None
    patience: Patience | None = None


def pull(name: HubName, settings: HubSettings, options: PullOptions | None = None, tell: Say = say) -> Path:
    """Download what is missing of a model and return its folder, which open_checkpoint has accepted.

    tell: takes lines for the user. Ctrl-C (KeyboardInterrupt) keeps what came, as a failure does; the next
    call goes on from there. Raises HubError; CheckpointError when the hub's files are no gpt-oss after all.
    """
    options = options or PullOptions()
    if settings.is_offline:
        raise HubError(f"{name}: is not here, and HF_HUB_OFFLINE is set; unset it to download")
    web = open_web(settings, name, options.token, options.patience)
    model = list_model(web, settings, name)
    with explained(name):
        files = choose_files(web, model, options.original)
    store = _store(model, settings, options)
    notice = f"{name}: another download of it is running; waiting for its end"
    with ExitStack() as stack:
        for path in store.locks(files):
            stack.enter_context(locked(path, lambda: tell(notice)))
        with explained(name, "; what came is kept, and the same command goes on from there"):
            _fetch(web, model, files, store, tell)
        folder = store.finish(files)
    folder = folder / "original" if files[0].path.startswith("original/") else folder
    open_checkpoint(folder).close()
    return folder


@contextmanager
def explained(name: HubName, remark: str = "") -> Iterator[None]:
    """Say what a failure means to whoever asked for the model, and the remark. Raises HubError."""
    try:
        yield
    except Refusal as error:
        raise HubError(explain(error, name) + remark) from None
    except Unreachable as error:
        raise HubError(f"{name}: {error}{remark}") from None


def _store(model: RemoteModel, settings: HubSettings, options: PullOptions) -> Store:
    if options.folder is not None:
        return FolderStore(options.folder.absolute(), may_replace=False)
    if model.name.source == "modelscope":
        return FolderStore(
            modelscope_folder(settings.modelscope_cache, model.name).absolute(), may_replace=True
        )
    return CacheStore(settings.huggingface_cache.absolute(), model)


def _fetch(web: Web, model: RemoteModel, files: Sequence[RemoteFile], store: Store, tell: Say) -> None:
    """Bring every file that the store lacks."""
    unique = {file.checksum: file for file in files}
    wanted = [file for file in unique.values() if not store.has(file)]
    if not wanted:
        return
    with ExitStack() as stack:
        parts: list[PartFile] = []
        for file in wanted:
            parts.append(PartFile(store.parts, file))
            stack.callback(parts[-1].close)
        total, here = sum(file.size for file in wanted), sum(part.done_bytes for part in parts)
        _require_room(store.parts, total - here)
        before = f", {size_text(here)} of it here already" if here else ""
        tell(f"downloading {model.name}: {size_text(total)}{before}, into {store.folder}")
        transfer = Transfer(web, parts, NUM_CONNECTIONS)
        try:
            with download_bar(model.name.repo) as progress:
                transfer.run(progress)
        except KeyboardInterrupt:
            kept = sum(part.done_bytes for part in parts)
            tell(
                f"stopped: {size_text(kept)} of {size_text(total)} are kept, "
                "and the same command goes on from there"
            )
            raise
        for part in parts:
            store.take(part)


def _require_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes + _SPARE_BYTES > free:
        raise HubError(
            f"{folder}: {size_text(needed_bytes)} are still to come and {size_text(free)} are free there; "
            "--dir, HF_HOME or MODELSCOPE_CACHE names another place"
        )
