"""What a hub holds under a name: files with sizes and checksums, read from its file interface.

Nothing a hub says is believed unchecked: paths stay inside the model's folder, checksums become file names.

Source: the documented HTTP interface of Hugging Face (GET /api/models/REPO/revision/REVISION?blobs=true and
/REPO/resolve/REVISION/PATH); ModelScope's (GET /api/v1/models/REPO/repo/files and /api/v1/models/REPO/repo),
as the package modelscope-hub 0.5.1 calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from harmonium.checkpoint.files import shorten
from harmonium.errors import HubError
from harmonium.hub.names import HUB_TITLES, HubName, is_openai
from harmonium.hub.settings import HubSettings
from harmonium.hub.web import Patience, Refusal, Unreachable, Web

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file. path: inside the repository, with "/". sha256 or git_sha1 is given (the latter is Git's, of
    "blob SIZE\\0" and the bytes)."""

    path: str
    size: int
    url: str
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def checksum(self) -> str:
        """In hexadecimal; also the file's name among a cache's blobs."""
        checksum = self.sha256 or self.git_sha1
        assert checksum is not None, "listings without checksums are refused"
        return checksum


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """name: with the revision that was asked for. commit: None where the hub does not tell."""

    name: HubName
    commit: str | None
    files: Mapping[str, RemoteFile]


def open_web(
    settings: HubSettings, name: HubName, token: str | None = None, patience: Patience | None = None
) -> Web:
    """The way to a name's hub, with the token for it: the one given, else the environment's."""
    if name.source == "huggingface":
        token = token or settings.huggingface_token
        private = {"Authorization": f"Bearer {token}"} if token else {}
        return Web(
            settings.huggingface_endpoint, private, certificates=settings.certificates, patience=patience
        )
    token = token or settings.modelscope_token
    # Older parts of the interface want the cookie, newer ones the header.
    private = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    return Web(settings.modelscope_endpoint, private, certificates=settings.certificates, patience=patience)


def list_model(web: Web, settings: HubSettings, name: HubName) -> RemoteModel:
    """Ask the hub what it holds. Raises HubError: no network, no such model or revision, gated."""
    try:
        if name.source == "huggingface":
            return _list_huggingface(web, settings.huggingface_endpoint, name)
        return _list_modelscope(web, settings.modelscope_endpoint, name)
    except Unreachable as error:
        raise HubError(_no_network(error, name)) from None
    except Refusal as error:
        raise HubError(explain(error, name)) from None


def _list_huggingface(web: Web, endpoint: str, name: HubName) -> RemoteModel:
    revision = quote(name.revision or "main", safe="")
    table = web.json(f"{endpoint}/api/models/{name.repo}/revision/{revision}?blobs=true")
    commit, siblings = table.get("sha"), table.get("siblings")
    if not isinstance(commit, str) or not _SHA1.fullmatch(commit) or not isinstance(siblings, list):
        raise HubError(f"{name}: the hub's answer has no commit and files; is {endpoint} a Hugging Face hub?")
    files = []
    for entry in _objects(siblings, name):
        path = _path(entry.get("rfilename"), name)
        large = entry.get("lfs")
        sha256 = large.get("sha256") if isinstance(large, dict) else None
        url = f"{endpoint}/{name.repo}/resolve/{commit}/{quote(path)}"
        sha1 = None if sha256 else entry.get("blobId")
        files.append(RemoteFile(path, _size(entry.get("size"), path, name), url, sha256, sha1))
    return RemoteModel(name, commit, _checked(files, name))


def _list_modelscope(web: Web, endpoint: str, name: HubName) -> RemoteModel:
    revision = quote(name.revision or "master", safe="")
    base = f"{endpoint}/api/v1/models/{name.repo}/repo"
    table = web.json(f"{base}/files?Revision={revision}&Recursive=true")
    data = table.get("Data")
    listed = data.get("Files") if isinstance(data, dict) else None
    if not isinstance(listed, list):
        said = shorten(table.get("Message"))
        raise HubError(f"{name}: the hub's answer has no files ({said}); is {endpoint} ModelScope?")
    files = []
    for entry in _objects(listed, name):
        if entry.get("Type") == "tree":
            continue
        path = _path(entry.get("Path"), name)
        url = f"{base}?Revision={revision}&FilePath={quote(path, safe='')}"
        files.append(RemoteFile(path, _size(entry.get("Size"), path, name), url, entry.get("Sha256")))
    return RemoteModel(name, None, _checked(files, name))


def _objects(listed: list[Any], name: HubName) -> Iterable[dict[str, Any]]:
    if len(listed) > _MAX_FILES:
        raise HubError(f"{name}: lists {len(listed):,} files; expected at most {_MAX_FILES:,}")
    return [entry for entry in listed if isinstance(entry, dict)]


def _path(value: object, name: HubName) -> str:
    """A path that stays where it is put."""
    if not isinstance(value, str) or not value or len(value) > 1000 or set(value) & set("\\\0\n\r"):
        raise HubError(f"{name}: lists a file called {shorten(value)}")
    if any(part in ("", ".", "..") for part in value.split("/")):
        raise HubError(f"{name}: lists a file called {shorten(value)}, which leads out of its folder")
    return value


def _size(value: object, path: str, name: HubName) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 50:
        raise HubError(f"{name}: {path} has the size {shorten(value)}; expected a number of bytes")
    return value


def _checked(files: list[RemoteFile], name: HubName) -> dict[str, RemoteFile]:
    """Keep the files that have a checksum; the rest cannot be told from a broken copy."""
    kept = {}
    for file in files:
        sha256, sha1 = file.sha256, file.git_sha1
        if isinstance(sha256, str) and _SHA256.fullmatch(sha256.lower()):
            kept[file.path] = replace(file, sha256=sha256.lower(), git_sha1=None)
        elif isinstance(sha1, str) and _SHA1.fullmatch(sha1):
            kept[file.path] = replace(file, sha256=None)
    if files and not kept:
        raise HubError(f"{name}: the hub gives no checksums, so a download could not be checked")
    return kept


def explain(error: Refusal, name: HubName) -> str:
    """What a refusal means to whoever asked for a model."""
    hub, status = HUB_TITLES[name.source], error.http_status
    hints = {
        "huggingface": f"https://huggingface.co/{name.repo}, then HF_TOKEN or --token",
        "modelscope": f"https://modelscope.cn/models/{name.repo}, then MODELSCOPE_API_TOKEN or --token",
    }
    if error.hub_code == "GatedRepo" or status == 403:
        ask = hints[name.source]
        return f"{name.repo} is gated on {hub}: its owner wants to be asked first ({ask}; {error})"
    if error.hub_code == "RevisionNotFound":
        return f"{name.repo} has no revision {name.revision!r} on {hub} ({error})"
    if error.hub_code == "EntryNotFound":
        return f"{name.repo} lost a file on {hub} while it was downloaded ({error})"
    if status in (401, 404):
        at = f" (or no revision {name.revision!r} of it)" if name.revision else ""
        known = "" if is_openai(name) else "; expected such as openai/gpt-oss-20b, 20b or 120b"
        private = "or a private one that the token does not open"
        return f"no model {name.repo!r}{at} on {hub}, {private}{known} ({error})"
    return f"{name}: {error}"


def _no_network(error: Unreachable, name: HubName) -> str:
    other = (
        "HF_ENDPOINT names a mirror, HARMONIUM_SOURCE=modelscope the other hub"
        if name.source == "huggingface"
        else "HARMONIUM_SOURCE=huggingface names the other hub"
    )
    return f"{name}: {error}; is there a network? HTTPS_PROXY names a proxy, {other}"
