"""Clients that leave, wait, or come too many: slots and requests are given back, nobody hangs."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import pytest

from harmonium.engine import ScriptedEngine
from harmonium.engine.local import LocalEngine
from harmonium.server import ServerConfig, ServerState, create_app
from tests.engine.fake_runner import FakeRunner
from tests.engine.serving import check_empty, make_engine
from tests.scripted_chat import gen
from tests.server.client import BASE_URL, HELLO, chat, engine_of, error_of, make_state
from tests.server.live import served, wait_until

LONG = "<|channel|>final<|message|>" + "word " * 5000 + "<|return|>"
PATH = "/v1/chat/completions"


def slow_state(**config: Any) -> ServerState:
    """A server whose answers take long."""
    return ServerState(ServerConfig(**config), ScriptedEngine([gen(LONG)], seconds_per_event=0.005))


def raw_request(url: str, body: dict[str, Any], path: str = PATH) -> socket.socket:
    """A connection on which the request is sent and nothing is read yet."""
    address = httpx.URL(url)
    connection = socket.create_connection((address.host, address.port or 80), timeout=5)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


BODIES: list[tuple[str, dict[str, Any]]] = [
    (PATH, {"messages": HELLO, "stream": True}),
    (PATH, {"messages": HELLO, "stream": True, "n": 3}),
    (PATH, {"messages": HELLO}),
    (PATH, {"messages": HELLO, "n": 3}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 4000, "stream": True}),
    ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 4000, "stream": True}),
    ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 4000}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_client_that_leaves_frees_slot_and_request(path: str, body: dict[str, Any]) -> None:
    state = slow_state(max_concurrency=8)
    engine = engine_of(state)
    with served(state) as url:
        for _ in range(3):
            with raw_request(url, body, path):
                wait_until(lambda: engine.running > 0)
            wait_until(lambda: engine.running == 0 and state.num_held == 0)
    assert set(engine.finished) == {"aborted"}


class SlowRunner(FakeRunner):
    """Takes its time for a step, so that requests queue, prefill and decode while clients leave."""

    def step(self, batch: Any) -> Any:
        time.sleep(0.002)
        return super().step(batch)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_leaving_in_queue_prefill_and_decode_gives_every_block_back(is_streamed: bool) -> None:
    engine = make_engine(SlowRunner(), max_sequences=2, max_batch_tokens=8, context_length=1000)
    assert isinstance(engine, LocalEngine)
    state = ServerState(ServerConfig(max_concurrency=2, max_queue=60), engine)
    prompt = [number % 90 for number in range(300)]
    body = {"prompt": prompt, "max_tokens": 500, "stream": is_streamed, "ignore_eos": True}
    try:
        with served(state) as url:
            for number in range(20):
                connections = [raw_request(url, body, "/v1/completions") for _ in range(5)]
                wait_until(lambda: state.num_held > 0)
                time.sleep(0.004 * number)
                for connection in connections:
                    connection.close()
            wait_until(lambda: state.num_held == 0 and engine.statistics.running == 0)
            wait_until(lambda: engine.statistics.waiting == 0)
            check_empty(engine)
    finally:
        asyncio.run(engine.close())


def test_more_answers_than_slots_are_429_before_any_token() -> None:
    state = slow_state(max_concurrency=1, max_queue=1)
    with served(state) as url:
        held = [raw_request(url, {"messages": HELLO, "stream": True}) for _ in range(2)]
        wait_until(lambda: state.num_held == 2)
        for body in ({"messages": HELLO}, {"messages": HELLO, "stream": True}):
            response = httpx.post(f"{url}{PATH}", json=body)
            error = error_of(response, 429)
            assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
            assert "try again in 1s" in error["message"]
            assert response.headers["retry-after"] == "1"
        metrics = httpx.get(f"{url}/metrics").text
        assert 'vllm:num_requests_running{model_name="scripted"} 1.0' in metrics
        assert 'vllm:num_requests_waiting{model_name="scripted"} 1.0' in metrics
        assert "harmonium:requests_refused_total 2.0" in metrics
        for connection in held:
            connection.close()
        wait_until(lambda: state.num_held == 0)
        metrics = httpx.get(f"{url}/metrics").text
        assert 'vllm:num_requests_running{model_name="scripted"} 0.0' in metrics
        assert 'finished_reason="abort",model_name="scripted"} 2.0' in metrics


def test_n_answers_take_n_slots_or_none() -> None:
    state = make_state(LONG, max_concurrency=1, max_queue=2)
    assert error_of(chat(state, n=4), 429)["code"] == "rate_limit_exceeded"
    assert state.num_held == 0
    assert chat(state, n=3).status_code == 200


def test_client_that_reads_nothing_counts_as_gone() -> None:
    state = ServerState(
        ServerConfig(idle_write_seconds=0.2, limits=ServerConfig().limits),
        ScriptedEngine([gen(LONG) * 20]),
    )
    with served(state) as url, raw_request(url, {"messages": HELLO, "stream": True, "n": 8}):
        wait_until(lambda: state.num_held == 8)
        wait_until(lambda: state.num_held == 0, 8.0)


def test_closing_the_engine_ends_streams_with_an_error_object() -> None:
    state = slow_state()

    async def run() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
            posts = [
                asyncio.create_task(client.post(PATH, json={"messages": HELLO, "stream": streamed}))
                for streamed in (True, False)
            ]
            engine = engine_of(state)
            while engine.running < 2:
                await asyncio.sleep(0.001)
            assert state.loaded_engine is not None
            await state.loaded_engine.close()
            return await posts[0], await posts[1]

    streamed, whole = asyncio.run(run())
    last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "server_draining"
    assert error_of(whole, 503)["code"] == "server_draining"
    assert state.num_held == 0


def test_one_bad_answer_of_several_ends_them_all() -> None:
    from harmonium.engine import Script

    scripts = [Script(gen(LONG)), Script(gen("<|channel|>final<|message|>x"), error="broken")]
    engine = ScriptedEngine(scripts, seconds_per_event=0.05)  # the long one alone takes minutes
    state = ServerState(ServerConfig(), engine)
    assert error_of(chat(state, n=2), 500)["message"] == "broken"
    streamed = chat(state, n=2, stream=True)
    assert json.loads(streamed.text.strip().split("\n\n")[-1][6:])["error"]["message"] == "broken"
    assert state.num_held == 0
    # A server that computes for us sees a moment later that we left.
    wait_until(lambda: engine.running == 0, 60)
