"""Behaviors that the peers' own suites check, in tests of our own.

llama-server: test_compat_oai_responses, test_security, test_log_injection. vLLM: tests/entrypoints/openai/
responses, of which test_replayed_input_items and test_response_input_to_harmony are in
test_prompt_variations.py. Left out: what needs images, MCP servers or the peers' own extensions (llama.cpp's
timings_per_token and return_progress; vLLM's enable_response_messages, chat templates and WebSocket).
"""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest

from tests.scripted_chat import FINAL, REASONED
from tests.server.client import call, engine_of, error_of, make_state, prompt_text, with_client
from tests.server.responses_client import PATH, events_of, function, respond, stream, texts

Json = dict[str, Any]
CALL = (
    "<|channel|>analysis<|message|>R1<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"a":1}<|call|>'
)


# llama-server


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"type": "text"}, 200),
        ({"type": "json_object"}, 200),
        ({"type": "json_schema", "name": "test", "schema": {"const": "foo"}}, 200),
        ({"type": "json_schema", "name": "test"}, 400),
        ({"type": "json_schema", "schema": {}}, 400),
        ({"type": "xml"}, 400),
        ({}, 200),
    ],
)
def test_format_of_the_text_is_taken_or_refused(form: Json, status: int) -> None:
    body = {"input": "Write an example", "text": {"format": form}}
    answer = call(make_state(FINAL.format('"foo"')), "POST", PATH, json=body)
    assert answer.status_code == status, answer.text
    if status == 400:
        assert error_of(answer, 400)["param"].startswith("text.format")


def test_ids_have_their_prefixes_and_stay_the_same_in_a_stream() -> None:
    events = stream(make_state(CALL), tools=[function("f")])
    response_ids = {event["response"]["id"] for event in events if "response" in event}
    (response_id,) = response_ids
    assert response_id.startswith("resp_")
    items = events[-1]["response"]["output"]
    assert [item["id"].split("_")[0] for item in items] == ["rs", "fc"]
    assert items[1]["call_id"].startswith("call_")


PROTECTED = ["/v1/models", "/v1/chat/completions", "/v1/completions", PATH, "/tokenize", "/metrics"]


@pytest.mark.parametrize("key", [None, "invalid-key", "sk-secre", "sk-secret2"])
@pytest.mark.parametrize("path", PROTECTED)
def test_wrong_key_is_a_401_that_does_not_repeat_it(path: str, key: str | None) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    method = "GET" if path in ("/v1/models", "/metrics") else "POST"
    options: Json = {} if method == "GET" else {"json": {}}
    answer = call(make_state(REASONED, api_keys=("sk-secret",)), method, path, headers=headers, **options)
    error = error_of(answer, 401)
    assert error["code"] == "invalid_api_key"
    assert key is None or key not in answer.text
    assert "sk-secret" not in answer.text.replace("sk-secret2", "")


@pytest.mark.parametrize(
    "url",
    [
        "file://mtmd/x.jpeg",
        "file:///etc/passwd",
        "file://../x",
        "http://127.0.0.1:1/x",
        "data:image/png;base64,AA",
    ],
)
def test_no_url_of_an_image_is_opened(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was opened")

    monkeypatch.setattr("socket.create_connection", refused)
    monkeypatch.setattr("urllib.request.urlopen", refused)
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "test"}, part]}]}
    state = make_state(REASONED)
    assert "image" in error_of(call(state, "POST", "/v1/chat/completions", json=body), 400)["message"]
    assert not engine_of(state).requests


FORGED = "FORGED-LOG-LINE"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", f"/v1/responses/x%0D%0A{FORGED}"), ("GET", f"/v1/responses/x?after=%0D%0A{FORGED}"),
        ("GET", f"/v1/models/%0A{FORGED}"), ("GET", f"/%E2%80%A8{FORGED}"), ("POST", f"/v1/x%1B[31m{FORGED}"),
    ],
)  # fmt: skip
def test_nothing_in_a_url_begins_a_line_of_the_log(
    method: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answer = call(make_state(REASONED), method, path)
    assert answer.status_code in (200, 400, 404, 405)
    lines = "\n".join(record.getMessage() for record in caplog.records).splitlines()
    assert not any(line.lstrip().startswith(FORGED) for line in lines)
    assert "\x1b" not in "".join(lines)


# vLLM


@pytest.mark.parametrize("is_stored", [True, False])
def test_response_is_found_again_exactly_when_it_was_stored(is_stored: bool) -> None:
    async def work(client: httpx.AsyncClient) -> int:
        made = (await client.post(PATH, json={"input": "x", "store": is_stored})).json()
        return (await client.get(f"{PATH}/{made['id']}")).status_code

    assert with_client(make_state(REASONED), work) == (200 if is_stored else 404)


@pytest.mark.parametrize("after", [0, 3, 7])
def test_stream_of_a_background_response_is_replayed_event_for_event(after: int) -> None:
    async def work(client: httpx.AsyncClient) -> tuple[list[Json], list[Json]]:
        body = {"input": "x", "background": True, "stream": True}
        events = events_of(await client.post(PATH, json=body))
        response_id = events[0]["response"]["id"]
        options = {"stream": "true", "starting_after": str(after)}
        return events, events_of(await client.get(f"{PATH}/{response_id}", params=options))

    events, replayed = with_client(make_state(REASONED), work)
    assert replayed == events[after + 1 :]


def test_three_turns_go_on_from_each_other() -> None:
    state = make_state(REASONED, FINAL.format("Two"), FINAL.format("Three"))

    async def work(client: httpx.AsyncClient) -> list[str]:
        previous = None
        ids = []
        for text in ("first", "second", "third"):
            body = {"input": text, "previous_response_id": previous}
            made = (await client.post(PATH, json=body)).json()
            assert made["status"] == "completed", made
            previous = made["id"]
            ids.append(previous)
        return ids

    assert len(set(with_client(state, work))) == 3
    text = prompt_text(state)
    order = [text.index(part) for part in ("first", "Hi there", "second", "Two", "third")]
    assert order == sorted(order)
    assert "think hard" not in text


def test_several_results_belong_to_the_latest_call_of_their_id() -> None:
    state = make_state(REASONED)
    items = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": "c", "name": "old", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "function_call", "call_id": "c", "name": "new", "arguments": ""},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ]
    respond(state, items)
    assert "<|start|>functions.new to=assistant<|channel|>commentary<|message|>2<|end|>" in prompt_text(state)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "function_call_output", "call_id": "nobody", "output": "x"},
        {"type": "function_call", "name": "f", "arguments": "{}"},
        {"type": "image_url", "url": "https://example.com/img.png"},
        {"type": "computer_call_output", "call_id": "c", "output": {}},
        {"role": "wizard", "content": "x"},
        "text",
        None,
    ],
)
def test_item_that_means_nothing_is_refused_by_its_place(item: Any) -> None:
    answer = call(make_state(REASONED), "POST", PATH, json={"input": [item]})
    assert error_of(answer, 400)["param"].startswith("input")


@pytest.mark.parametrize("given", [1, 3, 100])
def test_limit_of_the_answer_holds_behind_calls_too(given: int) -> None:
    state = make_state(CALL, REASONED)
    items = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ]
    body = respond(state, items, tools=[function("f")], max_output_tokens=given)
    assert engine_of(state).requests[-1].sampling.max_tokens == given
    assert body["usage"]["output_tokens"] <= given
    assert (body["status"] == "incomplete") == (given < 100)


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_instructions_are_told_whatever_the_tool_choice(choice: str) -> None:
    state = make_state(FINAL.format("x"))
    body = respond(state, instructions="Be brief.", tools=[function("f")], tool_choice=choice)
    assert "# Instructions\n\nBe brief." in prompt_text(state)
    assert texts(body, "message") == ["x"]
