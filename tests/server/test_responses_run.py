"""Responses in the background: cancelled, followed by several, cut off by the server's end."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from harmonium.engine import ScriptedEngine
from harmonium.server import ServerConfig, ServerState
from harmonium.server.responses_input import prepare_response
from harmonium.server.responses_run import BackgroundRun, Responses
from harmonium.server.responses_schema import ResponsesRequest
from harmonium.server.store import ResponseStore
from tests.scripted_chat import FINAL, REASONED, gen
from tests.server.client import engine_of, error_of, make_state, with_client
from tests.server.responses_client import PATH, check_events, check_response, events_of, texts


def _responses(text: str, seconds: float) -> Responses:
    engine = ScriptedEngine([gen(text)], seconds_per_event=seconds)
    return Responses(ServerState(ServerConfig(), engine), ResponseStore())


async def _start(responses: Responses, response_id: str = "resp_1") -> BackgroundRun:
    body = ResponsesRequest(input="Hello", background=True)
    prepared = prepare_response(responses.state, responses.store, body, response_id=response_id, created_at=1)
    return await responses.start(prepared)


async def _all(run: BackgroundRun, after: int = -1) -> list[dict[str, Any]]:
    return [event async for event in run.follow(after)]


def test_cancelled_run_frees_its_slot_and_ends_its_stream() -> None:
    async def work() -> None:
        responses = _responses(FINAL.format("word " * 1000), 0.002)
        run = await _start(responses)
        listener = asyncio.create_task(_all(run))
        while len(run.events) < 8:
            await asyncio.sleep(0.001)
        body = await responses.cancel(run)
        assert (body["status"], body["output"][0]["status"]) == ("cancelled", "incomplete")
        assert responses.store.body("resp_1") == body
        assert responses.running == {}
        assert responses.state.num_running == 0
        await _rest(engine_of(responses.state))
        events = await listener
        check_events(events)
        assert events[-1]["type"] == "response.incomplete"
        assert await responses.cancel(run) == body

    asyncio.run(work())


def test_run_is_cancelled_before_its_first_event() -> None:
    async def work() -> None:
        responses = _responses(FINAL.format("x"), 10.0)
        run = await _start(responses)
        assert (await responses.cancel(run))["status"] == "cancelled"
        assert (responses.state.num_running, responses.running) == (0, {})

    asyncio.run(work())


def test_many_follow_a_run_from_where_they_want() -> None:
    async def work() -> None:
        responses = _responses(FINAL.format("word " * 30), 0.001)
        run = await _start(responses)
        early = [asyncio.create_task(_all(run, after)) for after in (-1, 0, 7)]
        abandoned = run.follow(-1)
        await anext(abandoned)
        await abandoned.aclose()
        whole, most, rest = await asyncio.gather(*early)
        check_events(whole)
        assert (most, rest) == (whole[1:], whole[8:])
        assert responses.store.events("resp_1") == whole
        assert await _all(run, 10_000) == []

    asyncio.run(work())


def test_response_is_stored_before_its_last_event_is_given_out() -> None:
    async def work() -> None:
        responses = _responses(FINAL.format("x"), 0.0)
        run = await _start(responses)
        async for event in run.follow(-1):
            if event["type"] == "response.completed":
                assert responses.store.body("resp_1") == event["response"]

    asyncio.run(work())


def test_run_that_the_server_cuts_off_has_failed() -> None:
    async def work() -> None:
        responses = _responses(FINAL.format("word " * 1000), 0.002)
        run = await _start(responses)
        while len(run.events) < 8:
            await asyncio.sleep(0.001)
        await responses.close()
        assert run.response["status"] == "failed"
        assert "shut down" in run.response["error"]["message"]
        check_events(run.events)

    asyncio.run(work())


def test_closed_engine_fails_the_response() -> None:
    async def work() -> None:
        responses = _responses(FINAL.format("word " * 1000), 0.002)
        run = await _start(responses)
        await engine_of(responses.state).close()
        events = await _all(run)
        check_events(events)
        assert events[-1]["type"] == "response.failed"

    asyncio.run(work())


async def _rest(engine: ScriptedEngine) -> None:
    """Wait until nothing runs. An engine on another machine hears a moment later that nobody reads."""
    end = time.monotonic() + 10
    while engine.running:
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def test_abandoned_stream_frees_its_slot_and_stores_nothing() -> None:
    async def work() -> None:
        responses = _responses(FINAL.format("word " * 1000), 0.0)
        body = ResponsesRequest(input="Hello", stream=True)
        for leave_after in range(0, 20, 3):
            prepared = prepare_response(
                responses.state, responses.store, body, response_id=f"resp_{leave_after}", created_at=1
            )
            events = responses.stream(prepared, await responses.open(prepared))
            for _ in range(leave_after):
                await anext(events)
            await events.aclose()
        assert responses.state.num_running == 0
        await _rest(engine_of(responses.state))
        assert len(responses.store) == 0

    asyncio.run(work())


def test_background_response_is_polled_resumed_and_kept() -> None:
    state = make_state(REASONED)

    async def work(client: httpx.AsyncClient) -> None:
        body = (await client.post(PATH, json={"input": "x", "background": True})).json()
        check_response(body)
        assert body["status"] == "queued"
        path = f"{PATH}/{body['id']}"
        while (now := (await client.get(path)).json())["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.001)  # in-process calls never give way to the task that works
        check_response(now)
        assert (now["status"], texts(now, "message")) == ("completed", ["Hi there"])
        whole = events_of(await client.get(path, params={"stream": "true"}))
        check_events(whole)
        assert whole[-1]["response"] == now
        rest = events_of(await client.get(path, params={"stream": "true", "starting_after": 5}))
        assert rest == whole[6:]
        assert (await client.post(f"{path}/cancel")).json() == now

    with_client(state, work)
    assert state.num_running == 0


def test_stream_of_a_foreground_response_cannot_be_replayed() -> None:
    state = make_state(FINAL.format("ok"))

    async def work(client: httpx.AsyncClient) -> None:
        body = (await client.post(PATH, json={"input": "x"})).json()
        answer = await client.get(f"{PATH}/{body['id']}", params={"stream": "true"})
        assert error_of(answer, 400)["code"] == "no_stored_stream"
        assert error_of(await client.post(f"{PATH}/{body['id']}/cancel"), 400)["code"] == "not_cancellable"

    with_client(state, work)
