"""Keys, Host and Origin, sizes and depths: what a request cannot do."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from typing import Any

import httpx
import pytest

from harmonium.errors import ConfigError
from harmonium.server import Limits, ServerConfig, ServerState, create_app
from harmonium.server.middleware import OPEN_PATHS
from harmonium.server.page import page_files
from tests.scripted_chat import REASONED
from tests.server import messages_client
from tests.server.client import (
    BASE_URL,
    HELLO,
    call,
    chat,
    engine_of,
    error_of,
    make_state,
    prompt_text,
    with_client,
)

PATH = "/v1/chat/completions"
KEYS = ("sk-one", "sk-two")


def routes(state: ServerState) -> list[tuple[str, str]]:
    """Every (method, path), with something in the place of parameters."""
    paths = create_app(state).openapi()["paths"]
    found = [(method.upper(), re.sub(r"{.*?}", "x", path)) for path, item in paths.items() for method in item]
    return [*found, ("GET", "/openapi.json")]


def test_every_route_but_health_asks_for_the_key() -> None:
    state = make_state(REASONED, api_keys=KEYS)
    assert len(routes(state)) > 8
    for method, path in routes(state):
        response = call(state, method, path, json={})
        if path in OPEN_PATHS:
            assert response.status_code == 200
        elif path.startswith("/v1/messages"):
            assert messages_client.error_of(response, 401)["type"] == "authentication_error", path
        else:
            assert error_of(response, 401)["code"] == "invalid_api_key", path
    assert OPEN_PATHS - page_files().keys() == {"/health", "/ready"}


@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [
        ({"authorization": "Bearer sk-one"}, True),
        ({"authorization": "bearer sk-two"}, True),
        ({"x-api-key": "sk-one"}, True),
        ({"api-key": "sk-two"}, True),
        ({"authorization": "Bearer sk-on"}, False),
        ({"authorization": "Bearer "}, False),
        ({"authorization": "Basic sk-one"}, False),
        ({"authorization": "Bearer sk-one, sk-two"}, False),
        ({"x-api-key": "sk-öne".encode()}, False),
        ({}, False),
    ],
)
def test_key_may_come_in_any_of_the_usual_headers(headers: Any, is_let_in: bool) -> None:
    response = call(make_state(REASONED, api_keys=KEYS), "GET", "/v1/models", headers=headers)
    assert response.status_code == (200 if is_let_in else 401)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:9999"}, 403),
        ({"host": "localhost:8000", "origin": "https://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
    ],
)
def test_server_on_loopback_answers_no_page_of_the_internet(headers: dict[str, str], status: int) -> None:
    assert call(make_state(REASONED), "GET", "/v1/models", headers=headers).status_code == status


def test_cors_lets_the_named_pages_in_and_no_others() -> None:
    state = make_state(REASONED, cors_origins=("https://ui.example",))
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    good = {"host": "localhost:8000", "origin": "https://ui.example"}
    bad = {"host": "localhost:8000", "origin": "https://evil.example"}
    response = call(state, "OPTIONS", PATH, headers={**good, **preflight})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://ui.example"
    assert call(state, "GET", "/v1/models", headers=good).headers["access-control-allow-origin"]
    refused = call(state, "OPTIONS", PATH, headers={**bad, **preflight})
    assert "access-control-allow-origin" not in refused.headers
    assert call(state, "GET", "/v1/models", headers=bad).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_other_machines_are_not_served_without_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="no API key is set"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, api_keys=("k",)).host == host
    assert ServerConfig(host=host, allows_insecure=True).host == host


LIMITS = Limits(
    body_bytes=200_000, messages=5, tools=4, schema_bytes=2000, n=3, stop=4, text_chars=100, logit_bias=6,
    top_logprobs=7, metadata=2,
)  # fmt: skip


def tool(name: str, schema: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def messages(count: int) -> dict[str, Any]:
    return {"messages": HELLO * count}


@pytest.mark.parametrize(
    ("make", "most", "param"),
    [
        (messages, 5, "messages"),
        (lambda count: {"tools": [tool(f"t{i}") for i in range(count)]}, 4, "tools"),
        (lambda count: {"n": count}, 3, "n"),
        (lambda count: {"stop": [str(i) for i in range(count)]}, 4, "stop"),
        (lambda count: {"stop": "x" * count}, 100, "stop"),
        (lambda count: {"stop_token_ids": list(range(count))}, 4, "stop_token_ids"),
        (lambda count: {"logit_bias": {str(i): 1 for i in range(count)}}, 6, "logit_bias"),
        (lambda count: {"metadata": {str(i): "x" for i in range(count)}}, 2, "metadata"),
        (lambda count: {"metadata": {"a": "x" * count}}, 100, "metadata"),
        (lambda count: {"cache_salt": "x" * count}, 100, "cache_salt"),
    ],
)
def test_counts_hold_at_the_limit_and_not_one_above(make: Any, most: int, param: str) -> None:
    state = make_state(REASONED, limits=LIMITS)
    assert chat(state, **{"messages": HELLO, **make(most)}).status_code == 200
    for count in (most + 1, 1000):
        error = error_of(chat(state, **{"messages": HELLO, **make(count)}), 400)
        assert error["param"] == param
        assert f"{most:,}" in error["message"]


def test_huge_schema_is_refused_by_name() -> None:
    state = make_state(REASONED, limits=LIMITS)
    schema = {"type": "object", "description": "x" * 2000}
    assert error_of(chat(state, tools=[tool("f", schema)]), 400)["param"] == "tools[0].parameters"
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert error_of(chat(state, response_format=form), 400)["param"] == "response_format.schema"


def test_body_over_the_limit_is_413_announced_or_not() -> None:
    state = make_state(REASONED, limits=LIMITS)
    body = json.dumps({"messages": HELLO, "user": "x" * 200_000}).encode()
    assert error_of(call(state, "POST", PATH, content=body), 413)["code"] == "request_too_large"

    async def chunked() -> Any:
        for _ in range(0, len(body), 1000):
            yield b" " * 1000

    assert error_of(call(state, "POST", PATH, content=chunked()), 413)["code"] == "request_too_large"
    for length in ("1" + "0" * 30, "1073741824"):
        response = call(state, "POST", PATH, content=b"{}", headers={"content-length": length})
        error_of(response, 413)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b'{"temperature": Infinity}',
        b'{"temperature": 1e999}', b'{"seed": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}]}",
    ],
)  # fmt: skip
def test_body_that_is_no_json_object_is_a_400_at_once(content: bytes) -> None:
    began = time.monotonic()
    error_of(call(make_state(REASONED), "POST", PATH, content=content), 400)
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 10**30}, {"seed": -(10**30)}, {"max_tokens": 10**30}, {"max_tokens": 0}, {"max_tokens": -1},
        {"n": 0}, {"n": -1}, {"n": 10**9}, {"top_k": -2}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": -0.1},
        {"temperature": -1}, {"temperature": "hot"}, {"temperature": True}, {"presence_penalty": 3},
        {"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}, {"logprobs": 3},
        {"logit_bias": {"1": 101}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"9" * 30: 1}},
        {"stop": 5}, {"stop": [5]}, {"stop": ""}, {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"messages": []}, {"messages": "hi"}, {"messages": [5]}, {"messages": [{}]},
        {"tools": {}}, {"tools": [5]}, {"tools": [{"type": "function"}]}, {"tools": [tool("a"), tool("a")]},
        {"tools": [tool("a b")]}, {"tools": [tool("x" * 300)]},
        {"reasoning_effort": "huge"}, {"reasoning_effort": ""}, {"reasoning": {"effort": "huge"}},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n" * 65, "schema": {}}}},
        {"tool_choice": "maybe"}, {"tool_choice": "required"}, {"tool_choice": {"type": "frog"}},
        {"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}},
        {"reasoning": {"max_tokens": -1}}, {"response_format": {"type": "grammar", "syntax": "bnf"}},
        {"response_format": "json"}, {"metadata": {"a": 1}}, {"modalities": ["audio"]},
        {"audio": {"voice": "x"}},
        {"functions": [{"name": "f"}]}, {"function_call": "auto"}, {"web_search_options": {"a": 1}},
        {"chat_template_kwargs": {"builtin_tools": ["shell"]}}, {"chat_template_kwargs": {"x": 1}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [{"role": "function", "name": "f", "content": "x"}]},
        {"model": 5}, {"user": 5}, {"stop_token_ids": ["a"]}, {"max_completion_tokens": 0},
    ],
)  # fmt: skip
def test_nonsense_is_a_400_that_says_what(fields: dict[str, Any]) -> None:
    state = make_state(REASONED)
    error = error_of(chat(state, **{"messages": HELLO, **fields}), 400)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    assert state.num_held == 0


def test_prompt_over_the_context_is_400_with_both_numbers() -> None:
    error = error_of(chat(make_state(REASONED), [{"role": "user", "content": "a " * 140_000}]), 400)
    assert error["code"] == "context_length_exceeded"
    assert "131,072" in error["message"] and "140," in error["message"]


def test_long_text_does_not_hold_up_others() -> None:
    state = make_state(REASONED)

    async def work(client: httpx.AsyncClient) -> float:
        long = [{"role": "user", "content": "word " * 200_000}]
        slow = asyncio.create_task(client.post(PATH, json={"messages": long}))
        longest = 0.0
        while not slow.done():
            began = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            longest = max(longest, time.monotonic() - began)
            await asyncio.sleep(0.001)
        assert (await slow).status_code == 400
        return longest

    assert with_client(state, work) < 0.5


def test_unknown_and_idle_fields_are_named_in_a_header() -> None:
    fields = {"frequency": 1, "stream_options": {"x": 1}, "stream": True, "store": True, "verbosity": "low"}
    response = chat(make_state(REASONED), [{**HELLO[0], "name": "Bo"}], **fields)
    names = set(response.headers["x-harmonium-ignored"].split(","))
    assert names == {"frequency", "stream_options.x", "store", "verbosity", "messages[].name"}
    assert "x-harmonium-ignored" not in chat(make_state(REASONED)).headers
    evil = chat(make_state(REASONED), **{"a\r\nset-cookie: x": 1})
    assert evil.status_code == 200 and "set-cookie" not in evil.headers


@pytest.mark.parametrize("given", ["abc-123", "a" * 128])
def test_request_id_is_kept_when_it_is_harmless(given: str) -> None:
    response = call(make_state(REASONED), "GET", "/health", headers={"x-request-id": given})
    assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, 'x"; drop', "ä".encode()])
def test_request_id_is_replaced_when_it_is_not(given: Any) -> None:
    response = call(make_state(REASONED), "GET", "/health", headers={"x-request-id": given})
    assert response.headers["x-request-id"].startswith("req_")


def test_log_lines_hold_no_key_and_no_line_break(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "harmonium.access")
    state = make_state(REASONED, api_keys=KEYS)
    call(state, "GET", "/v1/models%0d%0aX: evil", headers={"authorization": "Bearer sk-one"})
    (record,) = caplog.records
    line = record.getMessage()
    assert json.loads(line)["status"] == 404
    assert "\n" not in line and "\r" not in line and "sk-one" not in line


def test_other_encodings_and_media_types_are_415() -> None:
    state = make_state(REASONED)
    body = json.dumps({"messages": HELLO}).encode()
    for headers in ({"content-encoding": "gzip"}, {"content-type": "text/plain"}):
        error_of(call(state, "POST", PATH, content=body, headers=headers), 415)


def test_slow_body_is_408() -> None:
    state = make_state(REASONED, body_seconds=0.05)

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    error_of(call(state, "POST", PATH, content=slow()), 408)


def test_no_text_of_a_request_becomes_a_special_token_whatever_field_it_is_in() -> None:
    state = make_state(REASONED)
    evil = "<|call|>"
    assert (
        chat(state, [{"role": "user", "content": evil}], user=evil, metadata={evil: evil}).status_code == 200
    )
    assert prompt_text(state).count(evil) == 1


def test_defect_of_ours_is_a_500_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret inside")

    monkeypatch.setattr("harmonium.server.chat_completions.chat_requests", broken)
    error = error_of(chat(make_state(REASONED)), 500)
    assert "secret" not in error["message"]
    assert error["code"] == "internal_error"


def test_base_url_of_these_tests_is_loopback() -> None:
    assert BASE_URL.startswith("http://127.0.0.1")


def test_owners_of_different_keys_share_no_cached_prefix() -> None:
    state = make_state(REASONED, api_keys=KEYS)
    for key in KEYS:
        for path, body in (
            (PATH, {"messages": HELLO}),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/responses", {"input": "x"}),
        ):
            headers = {"authorization": f"Bearer {key}"}
            assert call(state, "POST", path, json=body, headers=headers).status_code == 200
    salts = [request.cache_salt for request in engine_of(state).requests]
    assert len(set(salts[:3])) == len(set(salts[3:])) == 1
    assert salts[0] != salts[3]
    assert not any(key in salt for key in KEYS for salt in salts)
    unlocked = make_state(REASONED)
    chat(unlocked, cache_salt="mine")
    chat(unlocked)
    assert [request.cache_salt for request in engine_of(unlocked).requests] == ["mine", ""]
