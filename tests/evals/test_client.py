"""The client waits when it is asked to, gives up with the reason, and adds up streams."""

from __future__ import annotations

import email.utils
import socket
import threading
import time
from typing import Any

import pytest

from harmonium.errors import ConfigError
from harmonium.evals import client as client_module
from harmonium.evals.client import Address, AskFailed, ChatClient, Stopped
from harmonium.evals.item import Reply
from tests.evals.rude_server import Answer, chunk, ended, refused, rude_server, said

BODY: dict[str, Any] = {"model": "rude", "messages": [{"role": "user", "content": "hi"}]}


def ask(url: str, **options: Any) -> Reply:
    return ChatClient(Address.parse(url), **options).ask(BODY)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were to be waited; nobody waits for real."""
    waited: list[float] = []

    def wait(self: threading.Event, seconds: float | None = None) -> bool:
        if seconds is not None and self.is_set() is False:
            waited.append(seconds)
        return self.is_set()

    monkeypatch.setattr(client_module.threading, "Event", type("Event", (threading.Event,), {"wait": wait}))
    return waited


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://host/some/path", "https://host/some/path"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_address_gets_its_path(url: str, whole: str) -> None:
    assert str(Address.parse(url)) == whole


@pytest.mark.parametrize(
    "url", ["", "host:8000", "ftp://host", "http://", "http://host:99999999", "file:///etc"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        Address.parse(url)


def test_stream_is_added_up() -> None:
    call = {"index": 0, "function": {"name": "f", "arguments": '{"a":'}}
    more = {"index": 0, "function": {"arguments": "1}"}}
    lines = [
        ": a comment",
        chunk(role="assistant", reasoning_content="th", reasoning="th"),
        chunk(reasoning_content="ink", reasoning="ink"),
        chunk(content="On"),
        chunk(content="e"),
        chunk(tool_calls=[call]),
        chunk(tool_calls=[more]),
        *ended(
            "tool_calls",
            prompt_tokens=7,
            completion_tokens=9,
            completion_tokens_details={"reasoning_tokens": 3},
        ),
    ]
    with rude_server(Answer(lines=lines)) as server:
        reply = ask(server.url, api_key="sk-1")
    assert (reply.reasoning, reply.content, reply.tool_calls) == ("think", "One", (("f", '{"a":1}'),))
    assert (reply.prompt_tokens, reply.completion_tokens, reply.reasoning_tokens) == (7, 9, 3)
    assert reply.is_reasoning_counted
    assert reply.finish_reason == "tool_calls" and not reply.is_truncated
    assert reply.first_token_seconds is not None and reply.first_token_seconds <= reply.seconds
    assert server.bodies[0]["stream"] is True and server.bodies[0]["stream_options"] == {
        "include_usage": True
    }
    assert server.headers[0]["authorization"] == "Bearer sk-1"


def test_reasoning_tokens_that_the_server_leaves_out_are_counted() -> None:
    lines = [chunk(reasoning="I think so"), chunk(content="x"), *ended("stop", completion_tokens=9)]
    with rude_server(Answer(lines=lines)) as server:
        reply = ask(server.url)
    assert (reply.reasoning_tokens, reply.is_reasoning_counted) == (3, False)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_full_server_is_asked_again_when_it_says(status: int, short_waits: list[float]) -> None:
    with rude_server(refused(status, retry_after="7"), refused(status), said("here")) as server:
        reply = ask(server.url)
    assert (reply.content, reply.retries) == ("here", 2)
    assert short_waits == [7.0, 2.0]


def test_date_of_retry_after_is_understood(short_waits: list[float]) -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    with rude_server(refused(503, retry_after=date), refused(429, retry_after="soon"), said("x")) as server:
        ask(server.url)
    assert 20 < short_waits[0] <= 30
    assert short_waits[1] == 2.0


def test_server_that_stays_full_is_given_up(short_waits: list[float]) -> None:
    with (
        rude_server(refused(429, "try again in 60s", retry_after="60")) as server,
        pytest.raises(AskFailed) as caught,
    ):
        ask(server.url)
    assert "HTTP 429: try again in 60s" in str(caught.value)
    assert not caught.value.is_connection
    assert sum(short_waits) == client_module.MAX_WAIT_SECONDS


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500])
def test_other_refusals_are_told_at_once(status: int, short_waits: list[float]) -> None:
    with (
        rude_server(refused(status, "not so")) as server,
        pytest.raises(AskFailed, match=f"HTTP {status}: not so"),
    ):
        ask(server.url)
    assert not short_waits
    assert len(server.bodies) == 1


def test_stream_that_breaks_off_is_tried_again() -> None:
    with rude_server(Answer(lines=[chunk(content="ha")]), said("whole")) as server:
        assert ask(server.url).content == "whole"


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (['data: {"error": {"message": "the engine failed"}}'], "the engine failed"),
        (["data: {nonsense"], "no JSON"),
        (["data: [1]"], "no object"),
        (['data: {"choices": [1]}'], "form"),
        (['data: {"choices": [{"delta": {"content": 5}}]}'], "form"),
        ([chunk(content="x"), "data: [DONE]"], "without a finish_reason"),
    ],
)
def test_stream_that_is_wrong_is_an_error(lines: list[str], why: str) -> None:
    with rude_server(Answer(lines=lines)) as server, pytest.raises(AskFailed, match=why):
        ask(server.url)
    assert len(server.bodies) == 1


def test_nobody_there_is_told_as_such(short_waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = ChatClient(Address.parse(f"http://127.0.0.1:{port}"))
    with pytest.raises(AskFailed, match="no answer from") as caught:
        client.ask(BODY)
    assert caught.value.is_connection
    assert len(short_waits) == client_module.MAX_BROKEN - 1
    with pytest.raises(ConfigError, match="nobody answers at"):
        client.model_names()


def test_silent_server_is_not_waited_for_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(AskFailed, match="timed out"):
            ask(url, silence_seconds=0.05)


def test_stopped_run_waits_no_longer() -> None:
    with rude_server(refused(429)) as server:
        client = ChatClient(Address.parse(server.url))
        client.stop()
        with pytest.raises(Stopped):
            client.ask(BODY)


def test_models_are_listed_or_the_reason_is_told() -> None:
    with rude_server(said("x"), models=("a", "b")) as server:
        assert ChatClient(Address.parse(server.url)).model_names() == ["a", "b"]
        elsewhere = ChatClient(Address("http", "127.0.0.1", int(server.url.rsplit(":", 1)[1]), "/v2"))
        assert elsewhere.model_names() == ["a", "b"]
