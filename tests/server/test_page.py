"""The page at `/`: its files as they are served, and in a headless Chromium what a person does with it."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest

from harmonium.server.page import MEDIA_TYPES, PAGE_FOLDER, page_files
from tests.scripted_chat import gen
from tests.server.client import make_state, with_client
from tests.server.live import served

FILES = sorted(page_files())

ANSWER = (
    "<|channel|>analysis<|message|>SECRET THOUGHT<|end|><|start|>assistant<|channel|>final<|message|>"
    "**Hi** <img src=x onerror=window.pwned=1> <script>window.pwned=1</script> "
    "[bad](javascript:window.pwned=1)<|return|>"
)
LONG = "<|channel|>final<|message|>" + "word " * 3000 + "<|return|>"


def get(path: str, **options: Any) -> httpx.Response:
    state = make_state(ANSWER, api_keys=("sk-one",))

    async def fetch(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get(path, **options)

    return with_client(state, fetch)


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_served_without_a_key_and_guarded(path: str) -> None:
    answer = get(path)
    assert answer.status_code == 200
    assert answer.content == page_files()[path].content
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/page/", "/page/../page.py", "/page/%2e%2e/page.py", "/page/none.js"])
def test_nothing_else_is_served(path: str) -> None:
    assert get(path).status_code in (401, 404)


def test_calls_of_the_page_still_need_the_key() -> None:
    assert get("/v1/models").status_code == 401


@pytest.mark.parametrize("path", FILES)
def test_files_name_no_other_host_and_make_no_html_of_text(path: str) -> None:
    text = page_files()[path].content.decode()
    hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {
        "www.w3.org"
    }  # w3.org: the name of SVG's namespace
    assert not hosts
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)


def test_package_holds_every_file_of_the_page() -> None:
    packaged = {entry.name for entry in resources.files("harmonium.server").joinpath("page").iterdir()}
    assert packaged == {path.name for path in PAGE_FOLDER.iterdir()}
    assert all(Path(name).suffix in MEDIA_TYPES for name in packaged)
    assert len(FILES) > 10 and "/" in FILES


@pytest.fixture
def browser() -> Any:
    pytest.importorskip("websockets", reason="websockets is not installed")
    from tests.server.chromium import chromium, find_chromium

    path = find_chromium()
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with chromium(path) as opened:
        yield opened


def send(page: Any, text: str) -> None:
    page.run("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")


@pytest.mark.slow
def test_answer_is_shown_as_text_with_its_reasoning_folded_and_kept_over_a_reload(browser: Any) -> None:
    with served(make_state(ANSWER)) as url:
        page = browser.open(url)
        send(page, "Hello <b>there</b>")
        page.wait("document.querySelector('#messages')?.innerText.includes('Try again')")
        shown = page.text("#messages")
        assert "<img src=x onerror=window.pwned=1>" in shown and "<script>" in shown
        assert "Hello <b>there</b>" in shown and "SECRET THOUGHT" not in shown
        assert (
            page.run("document.querySelectorAll('#messages img, #messages script, #messages b').length") == 0
        )
        assert page.run("[...document.querySelectorAll('a')].every(a => !a.href.startsWith('javascript'))")
        page.click("#messages summary")
        page.wait("document.querySelector('#messages').innerText.includes('SECRET THOUGHT')")
        page.reload()
        page.wait("document.querySelector('#messages')?.innerText.includes('Try again')")
        assert page.run("window.pwned ?? null") is None
        assert page.complaints() == []
        assert all(address.startswith(url) for address in page.requested())


@pytest.mark.slow
def test_escape_stops_an_answer_and_frees_its_slot(browser: Any) -> None:
    from harmonium.engine import ScriptedEngine
    from harmonium.server import ServerConfig, ServerState

    engine = ScriptedEngine([gen(LONG)], seconds_per_event=0.01)
    state = ServerState(ServerConfig(), engine)
    with served(state) as url:
        page = browser.open(url)
        send(page, "Go on")
        page.wait("document.querySelector('#messages').innerText.includes('word word')")
        page.press("Escape")
        page.wait(lambda: engine.running == 0)
        assert engine.finished == ["aborted"]
        assert page.text("#messages").count("word") < 3000
        assert page.complaints() == []
