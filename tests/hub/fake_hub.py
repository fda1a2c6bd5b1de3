"""A hub on this machine: the file interfaces of Hugging Face and ModelScope over a folder, with faults.

`python -m tests.hub.fake_hub FOLDER` serves FOLDER/OWNER/NAME; what it prints is what HF_ENDPOINT and
MODELSCOPE_ENDPOINT are set to. Large files (as LFS keeps them) come by a redirect to another host, as the
real hub's do, so that a token that follows it is seen.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_BYTES = 4096
"""Files from this size on are large."""

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Faults:
    """What goes wrong. cut_after: bytes of weights that may be sent in all, then every connection breaks
    off. corrupt: how many answers with weights have a wrong byte. ranges: whether Range is understood.
    failures: how many requests are answered with failure_status first. gated: the token that is needed.
    short_answers: how many answers with weights end halfway."""

    cut_after: int | None = None
    corrupt: int = 0
    ranges: bool = True
    failures: int = 0
    failure_status: int = 503
    gated: str | None = None
    short_answers: int = 0


@dataclass
class Seen:
    """One request: its path and query, and headers in lower case."""

    target: str
    host: str
    headers: dict[str, str]


@dataclass
class FakeHub:
    """Serve a folder of models until the end of the `with`. url: what the endpoint is set to."""

    folder: Path
    faults: Faults = field(default_factory=Faults)
    seen: list[Seen] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            fake = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        self.lock = threading.Lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def weights_requested(self) -> list[Seen]:
        """Requests for bytes of weights."""
        return [
            seen
            for seen in self.seen
            if seen.target.startswith("/cdn/") and seen.target.endswith(".safetensors")
        ]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.fake.seen.append(Seen(self.path, headers.get("host", ""), headers))
        faults = self.fake.faults
        with self.fake.lock:
            fails, faults.failures = faults.failures > 0, max(0, faults.failures - 1)
        if fails:
            self.refuse(faults.failure_status, "", "try later", {"Retry-After": "0"})
            return
        parts = urlsplit(self.path)
        words = [unquote(word) for word in parts.path.strip("/").split("/")]
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.route(words, query)

    def route(self, words: list[str], query: dict[str, str]) -> None:
        if words[:2] == ["api", "models"] and words[4:5] == ["revision"]:
            self.huggingface_listing("/".join(words[2:4]), words[5])
        elif words[:3] == ["api", "v1", "models"] and words[5:] == ["repo", "files"]:
            self.modelscope_listing("/".join(words[3:5]), query.get("Revision", ""))
        elif words[:3] == ["api", "v1", "models"] and words[5:] == ["repo"]:
            self.resolve("/".join(words[3:5]), query.get("FilePath", ""))
        elif words[2:3] == ["resolve"]:
            self.resolve("/".join(words[:2]), "/".join(words[4:]))
        elif words[:1] == ["cdn"]:
            self.send_file(self.fake.folder / "/".join(words[1:]), self.path.endswith(".safetensors"))
        else:
            self.refuse(404, "", "no such page")

    def repository(self, repo: str) -> Path | None:
        folder = self.fake.folder / repo
        if folder.is_dir():
            return folder
        self.refuse(404, "RepoNotFound", "Repository not found")
        return None

    def huggingface_listing(self, repo: str, revision: str) -> None:
        folder = self.repository(repo)
        if folder is None:
            return
        if revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = []
        for path, data in _files(folder):
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git_sha1(data)}
            if len(data) >= LFS_BYTES:
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        self.send_json({"id": repo, "sha": COMMIT, "siblings": siblings})

    def modelscope_listing(self, repo: str, revision: str) -> None:
        folder = self.repository(repo)
        if folder is None:
            return
        if revision != "master":
            self.refuse(404, "", f"revision {revision} not found")
            return
        listed = [
            {
                "Path": path,
                "Name": path.rpartition("/")[2],
                "Type": "blob",
                "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(),
            }
            for path, data in _files(folder)
        ]
        self.send_json({"Code": 200, "Success": True, "Data": {"Files": listed}})

    def resolve(self, repo: str, path: str) -> None:
        folder = self.repository(repo)
        if folder is None:
            return
        gate = self.fake.faults.gated
        if gate is not None and self.headers.get("Authorization") != f"Bearer {gate}":
            self.refuse(403, "GatedRepo", f"Access to model {repo} is restricted")
            return
        file = folder / path
        if not file.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif file.stat().st_size >= LFS_BYTES:
            self.send_response(302)
            # Another name of this machine, so another host.
            self.send_header("Location", f"http://localhost:{self.fake.port}/cdn/{quote(repo)}/{quote(path)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_file(file, False)

    def send_file(self, file: Path, is_weight: bool) -> None:
        data = file.read_bytes()
        first, end = 0, len(data)
        span = self.headers.get("Range") if self.fake.faults.ranges else None
        if span is not None:
            low, high = span.removeprefix("bytes=").split("-")
            first, end = int(low), min(int(high) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - first))
        self.end_headers()
        self.send_body(bytearray(data[first:end]), is_weight)

    def send_body(self, body: bytearray, is_weight: bool) -> None:
        faults = self.fake.faults
        with self.fake.lock:
            if is_weight and faults.corrupt > 0 and body:
                faults.corrupt -= 1
                body[len(body) // 2] ^= 1
            allowed = len(body)
            if is_weight and faults.short_answers > 0:
                faults.short_answers -= 1
                allowed = len(body) // 2
            if is_weight and faults.cut_after is not None:
                allowed = min(allowed, max(0, faults.cut_after - self.fake.sent))
            if is_weight:
                self.fake.sent += allowed
        self.wfile.write(body[:allowed])
        if allowed < len(body):
            self.close_connection = True

    def send_json(
        self, table: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        text = json.dumps(table).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self.send_json({"Code": status, "Message": message}, status, {**named, **(headers or {})})


def _files(folder: Path) -> list[tuple[str, bytes]]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(file.relative_to(folder).as_posix(), file.read_bytes()) for file in found]


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    with FakeHub(Path(sys.argv[1])) as hub:
        print(hub.url, flush=True)
        hub.thread.join()
