"""The chat page at `/`: the files of `page/`, as they are. They call this server's own API (docs/page.md).

Only those files are served, by their exact names: there is no path to look up. The page holds no secret, so
that it needs no key; what it calls does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, Request
from starlette.responses import Response

PAGE_FOLDER = Path(__file__).parent / "page"

MEDIA_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The kinds of files that are served. By our own list: a machine's registry of types may say otherwise."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No text becomes HTML: assigning to innerHTML fails in browsers that know this.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS: Mapping[str, str] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked about each time: a new version shows at once
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file: its bytes, what they are, and a strong ETag of them."""

    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """Every file of the page by the URL path at which it is served."""
    files = {}
    for path in sorted(PAGE_FOLDER.iterdir()):
        media_type = MEDIA_TYPES.get(path.suffix)
        if media_type is not None:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            url_path = "/" if path.name == "index.html" else f"/page/{path.name}"
            files[url_path] = PageFile(content, media_type, etag)
    return MappingProxyType(files)


async def get_page_file(request: Request) -> Response:
    """The file at this path; 304 when the client has it already."""
    file = page_files()[request.scope["route"].path]
    headers = {**_HEADERS, "etag": file.etag}
    if _names(request.headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


def _names(if_none_match: str, etag: str) -> bool:
    """Whether the header names this tag; a proxy that compressed the file may have made it a weak one."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def _make_router() -> APIRouter:
    made = APIRouter(include_in_schema=False)
    for path in page_files():
        made.add_api_route(path, get_page_file, methods=["GET", "HEAD"], response_class=Response)
    return made


router = _make_router()
