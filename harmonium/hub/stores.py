"""Where downloads are kept: Hugging Face's cache, as its own client lays it out, or a plain folder.

The cache: `blobs/CHECKSUM` are the files, `snapshots/COMMIT/PATH` links to them, `refs/REVISION` holds a
commit. So others that use the cache find what we fetched, and we what they did. A blob gets its name when it
is whole and checked; the links are made when all files are there, config.json's last, because nothing is
taken for a model without it. A plain folder keeps everything in `.harmonium-pull` until then.

Source: the guide "Understand caching" of huggingface_hub; flock on `.locks/REPO/CHECKSUM.lock` is how its
client keeps two downloads of a blob apart.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harmonium.errors import HubError
from harmonium.hub.listing import RemoteFile, RemoteModel
from harmonium.hub.names import HubName
from harmonium.hub.part_file import PartFile, has_checksum


class Store(Protocol):
    """A place for one model. folder: what `finish` returns. parts: where unfinished files lie."""

    @property
    def folder(self) -> Path: ...

    @property
    def parts(self) -> Path: ...

    def locks(self, files: Sequence[RemoteFile]) -> list[Path]:
        """Files to lock while these are fetched, always in the same order."""
        ...

    def has(self, file: RemoteFile) -> bool:
        """Whether the file is here whole. Raises HubError."""
        ...

    def take(self, part: PartFile) -> None:
        """A part is whole and checked: keep it. Raises HubError."""
        ...

    def finish(self, files: Sequence[RemoteFile]) -> Path:
        """All files are here: make them a model and return its folder. Raises HubError."""
        ...


def repository_folder(cache: Path, name: HubName) -> Path:
    """Of a model in Hugging Face's cache."""
    return cache / f"models--{name.repo.replace('/', '--')}"


@dataclass(frozen=True, slots=True)
class CacheStore:
    """Hugging Face's cache. model: with the commit."""

    cache: Path
    model: RemoteModel

    @property
    def _repository(self) -> Path:
        return repository_folder(self.cache, self.model.name)

    @property
    def folder(self) -> Path:
        assert self.model.commit is not None, "Hugging Face tells the commit"
        return self._repository / "snapshots" / self.model.commit

    @property
    def parts(self) -> Path:
        return self._repository / "blobs"

    def locks(self, files: Sequence[RemoteFile]) -> list[Path]:
        folder = self.cache / ".locks" / self._repository.name
        return [folder / "harmonium.lock", *(folder / f"{sum_}.lock" for sum_ in _checksums(files))]

    def has(self, file: RemoteFile) -> bool:
        # A blob is named when it is whole: reading 13 GB again at each start would be no use.
        blob = self.parts / file.checksum
        return blob.is_file() and blob.stat().st_size == file.size

    def take(self, part: PartFile) -> None:
        part.publish(self.parts / part.file.checksum)

    def finish(self, files: Sequence[RemoteFile]) -> Path:
        assert self.model.commit is not None, "Hugging Face tells the commit"
        try:
            for file in reversed(files):
                _link(self.folder / file.path, self.parts / file.checksum)
            ref = self._repository / "refs" / (self.model.name.revision or "main")
            if ref.name != self.model.commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                temporary = ref.with_name(f".{ref.name}.{os.getpid()}.tmp")
                temporary.write_text(self.model.commit, encoding="ascii")
                temporary.replace(ref)
        except OSError as error:
            raise HubError(f"{self.folder}: cannot be written ({error.strerror or error})") from None
        return self.folder


def _checksums(files: Sequence[RemoteFile]) -> list[str]:
    return sorted({file.checksum for file in files})


def _link(link: Path, blob: Path) -> None:
    """Put a relative link to a blob in place, whatever was there; a hard one where there are no others."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:
        temporary.hardlink_to(blob)
    temporary.replace(link)


@dataclass(frozen=True, slots=True)
class FolderStore:
    """A plain folder. may_replace: whether files with other bytes under the same names give way."""

    folder: Path
    may_replace: bool

    @property
    def parts(self) -> Path:
        return self.folder / ".harmonium-pull"

    def locks(self, files: Sequence[RemoteFile]) -> list[Path]:
        return [self.folder.parent / f".{self.folder.name}.harmonium-lock"]

    def has(self, file: RemoteFile) -> bool:
        if (self.parts / file.checksum).is_file():
            return True
        target = self.folder / file.path
        if not os.path.lexists(target):
            return False
        if has_checksum(target, file):
            return True
        if self.may_replace:
            return False
        raise HubError(
            f"{target}: is there with other bytes than the hub's {file.path}; expected an empty folder, or "
            "one that holds this model"
        )

    def take(self, part: PartFile) -> None:
        part.publish(self.parts / part.file.checksum)

    def finish(self, files: Sequence[RemoteFile]) -> Path:
        try:
            for file in reversed(files):
                kept = self.parts / file.checksum
                if kept.is_file():
                    (self.folder / file.path).parent.mkdir(parents=True, exist_ok=True)
                    kept.replace(self.folder / file.path)
            shutil.rmtree(self.parts, ignore_errors=True)
        except OSError as error:
            raise HubError(f"{self.folder}: cannot be written ({error.strerror or error})") from None
        return self.folder
