"""Two servers over one database: conversations, background responses of each other, death, lost databases."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from harmonium.engine import ScriptedEngine
from harmonium.engine.scripted import Script
from harmonium.errors import StoreError
from harmonium.server import (
    ServerConfig,
    ServerState,
    create_app,
    responses_elsewhere,
    responses_run,
    store_threads,
)
from harmonium.server.responses_run import Responses
from harmonium.server.stores import open_store
from tests.scripted_chat import FINAL, REASONED, gen
from tests.server.client import BASE_URL, error_of
from tests.server.postgres import missing, postgres
from tests.server.responses_client import PATH, TERMINAL, check_events, events_of, texts
from tests.server.test_shared_store import forget

SLOW = Script(gen(FINAL.format("word " * 20_000)), seconds_per_event=0.002)
"""Forty seconds at least, and nobody waits for its end."""

ANN, BOB = ({"authorization": f"Bearer {name}-key"} for name in ("ann", "bob"))


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_elsewhere, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(responses_elsewhere, "LOOK_SECONDS", 0.02)


class Server:
    """One of several servers."""

    def __init__(self, url: str, scripts: tuple[Script, ...], **config: Any) -> None:
        self.engine = ScriptedEngine(scripts)
        self.state = ServerState(ServerConfig(store_url=url, **config), self.engine)
        self.responses = Responses(self.state, open_store(self.state.config))
        transport = httpx.ASGITransport(create_app(self.state, self.responses))
        self.client = httpx.AsyncClient(transport=transport, base_url=BASE_URL)

    @property
    def store(self) -> Any:
        return self.responses.store

    async def respond(self, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post(PATH, json={"input": "Hello", **fields})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def get(self, response_id: str, **options: Any) -> httpx.Response:
        return await self.client.get(f"{PATH}/{response_id}", **options)

    async def begin(self, headers: dict[str, str] | None = None) -> str:
        """A background response of which the other servers have heard."""
        answer = await self.client.post(PATH, json={"input": "Hi", "background": True}, headers=headers)
        response_id: str = answer.json()["id"]
        owner = self.state.owner_of(answer.request.headers)  # type: ignore[arg-type]
        await until(lambda: self.store.events(response_id, owner))
        return response_id

    async def die(self) -> None:
        """As with SIGKILL: nothing that runs here says another word."""
        heartbeat = self.responses._heartbeat
        assert heartbeat is not None
        await heartbeat.close()
        forget(self.store)


@asynccontextmanager
async def servers(url: str, *scripts: Script, **config: Any) -> AsyncIterator[tuple[Server, Server]]:
    pair = (Server(url, scripts, **config), Server(url, scripts, **config))
    try:
        yield pair
    finally:
        for server in pair:
            await server.client.aclose()
            await server.responses.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another task or thread does. AssertionError after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen in a minute"
        await asyncio.sleep(0.005)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await work()

    asyncio.run(whole())


def test_conversation_goes_on_at_another_server(shared_url: str) -> None:
    async def work() -> None:
        async with servers(shared_url, Script(gen(FINAL.format("first answer")))) as (first, second):
            one = await first.respond(input="question one")
            two = await second.respond(input="question two", previous_response_id=one["id"])
            three = {"input": "three", "previous_response_id": two["id"]}
            shown = (await first.client.post(f"{PATH}/render", json=three)).json()["text"]
            said = ["question one", "first answer", "question two", "first answer", "three"]
            places = [shown.index(text) for text in said[:3]]
            assert places == sorted(places)
            assert shown.count("first answer") == 2
            assert (await second.get(one["id"])).json() == one
            listed = (await first.client.get(f"{PATH}/{two['id']}/input_items")).json()["data"]
            assert [item["content"][0]["text"] for item in listed] == ["question two"]
            assert (await second.client.delete(f"{PATH}/{one['id']}")).json()["deleted"]
            error = error_of(
                await first.client.post(PATH, json={**three, "previous_response_id": one["id"]}), 404
            )
            assert error["code"] == "previous_response_not_found"

    run(work)


def test_sealed_reasoning_of_one_server_is_taken_by_another(shared_url: str) -> None:
    async def work() -> None:
        async with servers(shared_url, Script(gen(REASONED))) as (first, second):
            made = await first.respond(include=["reasoning.encrypted_content"], store=False)
            call = [{"role": "user", "content": "Hello"}, made["output"][0]]
            shown = (await second.client.post(f"{PATH}/render", json={"input": call})).json()
            assert shown["warnings"] == []
            assert "think hard" in shown["text"]

    run(work)


def test_response_that_is_deleted_while_another_server_continues_it_leaves_its_words(shared_url: str) -> None:
    async def work() -> None:
        script = Script(gen(FINAL.format("the answer")), seconds_per_event=0.02)
        async with servers(shared_url, script) as (first, second):
            one = await first.respond(input="question one")
            fields = {"input": "question two", "previous_response_id": one["id"]}
            making = asyncio.create_task(second.respond(**fields))
            await until(lambda: second.engine.running)
            assert (await first.client.delete(f"{PATH}/{one['id']}")).json()["deleted"]
            three = {"input": "three", "previous_response_id": (await making)["id"]}
            shown = (await first.client.post(f"{PATH}/render", json=three)).json()["text"]
            assert [shown.count(text) for text in ("question one", "question two", "the answer")] == [1, 1, 2]

    run(work)


def test_background_response_is_fetched_and_followed_from_another_server(shared_url: str) -> None:
    script = Script(gen(FINAL.format("word " * 100)), seconds_per_event=0.01)

    async def work() -> None:
        async with servers(shared_url, script) as (first, second):
            response_id = await first.begin()
            seen = (await second.get(response_id)).json()
            assert seen["status"] == "in_progress"
            followed, late = await asyncio.gather(
                second.get(response_id, params={"stream": "true"}),
                second.get(response_id, params={"stream": "true", "starting_after": 3}),
            )
            events = events_of(followed)
            check_events(events)
            assert events_of(late) == events[4:]
            assert (await second.get(response_id)).json() == events[-1]["response"]
            for server in (first, second):
                assert events_of(await server.get(response_id, params={"stream": "true"})) == events
            assert texts(events[-1]["response"], "message") == ["word " * 100]

    run(work)


def test_events_come_to_another_server_while_the_response_is_made(shared_url: str) -> None:
    async def work() -> None:
        async with servers(shared_url, SLOW) as (first, second):
            response_id = await first.begin()
            events = responses_elsewhere.follow_elsewhere(second.store, response_id, "", -1)
            for number in range(20):
                assert (await anext(events))["sequence_number"] == number
            assert first.engine.running == 1
            await events.aclose()

    run(work)


def test_response_that_runs_elsewhere_cannot_be_continued_yet(shared_url: str) -> None:
    async def work() -> None:
        async with servers(shared_url, SLOW) as (first, second):
            fields = {"input": "x", "previous_response_id": await first.begin()}
            error = error_of(await second.client.post(PATH, json=fields), 409)
            assert error["code"] == "previous_response_running"

    run(work)


def test_cancel_from_another_server_frees_the_slot_and_ends_every_stream(shared_url: str) -> None:
    async def work() -> None:
        async with servers(shared_url, SLOW) as (first, second):
            response_id = await first.begin()
            streams = [
                asyncio.create_task(server.get(response_id, params={"stream": "true"}))
                for server in (first, second)
            ]
            await until(lambda: len(first.responses.running[response_id].events) > 20)
            body = (await second.client.post(f"{PATH}/{response_id}/cancel")).json()
            assert (body["status"], body["output"][0]["status"]) == ("cancelled", "incomplete")
            await until(lambda: first.state.num_running == first.engine.running == 0)
            own, other = [events_of(await stream) for stream in streams]
            check_events(own)
            assert other == own
            assert own[-1]["type"] == "response.incomplete"
            assert (await first.get(response_id)).json() == body
            again = await first.client.post(f"{PATH}/{response_id}/cancel")
            assert again.json() == body

    run(work)


def test_delete_from_another_server_ends_the_response_for_good(
    shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with servers(shared_url, SLOW) as (first, second):
            response_id = await first.begin()
            looks: list[str] = []
            events = second.store.events
            monkeypatch.setattr(
                second.store, "events", lambda id_, *rest: looks.append(id_) or events(id_, *rest)
            )
            follower = asyncio.create_task(second.get(response_id, params={"stream": "true"}))
            await until(lambda: looks)
            assert (await second.client.delete(f"{PATH}/{response_id}")).json()["deleted"]
            last = events_of(await follower)[-1]
            assert (last["type"], last["code"]) == ("error", "response_not_found")
            await until(lambda: first.state.num_running == first.engine.running == 0)
            await until(lambda: not first.responses.running)
            for server in (first, second):
                error_of(await server.get(response_id), 404)
            assert len(first.store) == 0

    run(work)


def test_no_other_owner_reaches_a_response_through_another_server(shared_url: str) -> None:
    keys = ("ann-key", "bob-key")

    async def attempts(server: Server, response_id: str) -> None:
        client, path = server.client, f"{PATH}/{response_id}"
        error_of(await client.get(path, headers=BOB), 404)
        error_of(await client.get(path, params={"stream": "true"}, headers=BOB), 404)
        error_of(await client.get(f"{path}/input_items", headers=BOB), 404)
        error_of(await client.post(f"{path}/cancel", headers=BOB), 404)
        error_of(await client.delete(path, headers=BOB), 404)
        fields = {"input": "x", "previous_response_id": response_id}
        error_of(await client.post(PATH, json=fields, headers=BOB), 404)

    async def work() -> None:
        async with servers(shared_url, SLOW, api_keys=keys) as (first, second):
            response_id = await first.begin(headers=ANN)
            for server in (first, second):
                await attempts(server, response_id)
            assert first.engine.running == 1
            answer = await second.client.post(f"{PATH}/{response_id}/cancel", headers=ANN)
            assert answer.json()["status"] == "cancelled"
            for server in (first, second):
                await attempts(server, response_id)
                assert (await server.get(response_id, headers=ANN)).json() == answer.json()

    run(work)


def test_response_of_a_server_that_died_has_failed(shared_url: str) -> None:
    async def work() -> None:
        async with servers(shared_url, SLOW) as (first, second):
            response_id = await first.begin()
            follower = asyncio.create_task(second.get(response_id, params={"stream": "true"}))
            await until(lambda: second.store.events(response_id))
            await first.die()
            events = events_of(await follower)
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            assert events[-1]["type"] == "response.failed"
            body = (await second.get(response_id)).json()
            assert events[-1]["response"] == body
            assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
            fields = {"input": "go on", "previous_response_id": response_id}
            shown = await second.client.post(f"{PATH}/render", json=fields)
            assert shown.status_code == 200

    run(work)


def test_cancel_of_a_response_whose_server_is_silent_does_not_wait_for_it(
    shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_elsewhere, "CANCEL_SECONDS", 0.1)

    async def work() -> None:
        async with servers(shared_url, SLOW) as (first, second):
            response_id = await first.begin()
            heartbeat = first.responses._heartbeat
            assert heartbeat is not None
            await heartbeat.close()
            body = (await second.client.post(f"{PATH}/{response_id}/cancel")).json()
            assert body["status"] == "cancelled"
            heartbeat.start()
            await until(lambda: first.state.num_running == first.engine.running == 0)
            await until(lambda: not first.responses.running)
            assert (await first.get(response_id)).json() == body

    run(work)


def test_database_that_is_away_is_a_503_that_names_it_and_other_requests_go_on(
    shared_url: str, tmp_path: Path
) -> None:
    """By an engine that refuses to give connections; the real thing stands in the next test."""
    from sqlalchemy.exc import OperationalError

    from harmonium.server.shared_database import Database

    def away(self: Database) -> Any:
        raise OperationalError("SELECT", {}, Exception("connection refused, s3cret"))

    async def work() -> None:
        async with servers(shared_url, Script(gen(FINAL.format("ok")))) as (first, _):
            made = await first.respond()
            engine = first.store._database._engine
            first.store._database._secrets = ("s3cret",)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(engine), "connect", away)
                num_played = len(first.engine.requests)
                for answer in (
                    await first.get(made["id"]),
                    await first.client.post(PATH, json={"input": "x"}),
                    await first.client.post(PATH, json={"input": "x", "stream": True}),
                    await first.client.post(PATH, json={"input": "x", "background": True}),
                    await first.client.delete(f"{PATH}/{made['id']}"),
                ):
                    error = error_of(answer, 503)
                    assert error["code"] == "store_unavailable"
                    assert "cannot be used: connection refused, ***" in error["message"]
                    assert answer.headers["retry-after"] == "5"
                assert len(first.engine.requests) == num_played
                assert first.state.num_held == 0
                assert (await first.respond(store=False))["status"] == "completed"
            assert (await first.get(made["id"])).json() == made

    run(work)


def test_database_that_hangs_is_a_503_and_other_requests_go_on(
    shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_threads, "ANSWER_SECONDS", 0.2)
    goes_on = threading.Event()

    def hang(*_: object) -> None:
        goes_on.wait(60)

    async def work() -> None:
        async with servers(shared_url, Script(gen(FINAL.format("ok")))) as (first, _):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(first.store, "body", hang)
                answers = await asyncio.gather(*(first.get("resp_1") for _ in range(20)))
                for answer in answers:
                    assert "did not answer within 0.2 s" in error_of(answer, 503)["message"]
                assert store_threads.has_stuck_threads()
                chat = {"messages": [{"role": "user", "content": "Hello"}]}
                assert (await first.client.post("/v1/chat/completions", json=chat)).status_code == 200
            goes_on.set()
            await until(lambda: not store_threads.has_stuck_threads())
            monkeypatch.setattr(store_threads, "ANSWER_SECONDS", 60)
            error_of(await first.get("resp_1"), 404)

    run(work)


def test_answer_waits_for_a_postgresql_that_restarts() -> None:
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("psycopg")
    why = missing()
    if why is not None:
        pytest.skip(why)
    is_away = threading.Event()

    async def work(url: str, cluster: Any) -> None:
        async with servers(url, Script(gen(FINAL.format("word " * 50)))) as (first, second):
            end = first.store.end
            first.store.end = lambda *rest: is_away.wait(60) and end(*rest)
            response_id = await first.begin()
            await asyncio.to_thread(cluster.stop)
            is_away.set()
            error = error_of(await second.get(response_id), 503)
            assert error["code"] == "store_unavailable"
            assert "never-shown" not in error["message"]
            await until(lambda: first.responses.running[response_id].writer.is_over)
            assert (await first.get(response_id)).json()["status"] == "completed"
            await asyncio.to_thread(cluster.start)
            await until(lambda: not first.responses.running)
            body = (await second.get(response_id)).json()
            assert body["status"] == "completed"
            events = events_of(await second.get(response_id, params={"stream": "true"}))
            check_events(events)
            assert events[-1]["response"] == body

    with postgres() as cluster:
        url = cluster.url.replace("harmonium@", "harmonium:never-shown@")
        run(lambda: work(url, cluster))


def _fail(*_: object) -> bool:
    raise StoreError("no space left")


def test_answer_that_cannot_be_stored_is_an_error_for_who_listens(
    shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_run, "STORE_SECONDS", 0.0)
    script = Script(gen(FINAL.format("word " * 50)), seconds_per_event=0.02)

    async def work() -> None:
        async with servers(shared_url, script) as (first, second):
            monkeypatch.setattr(first.store, "end", _fail)
            response_id = await first.begin()
            follower = first.responses.running[response_id].follow(-1)
            with pytest.raises(StoreError, match="no space left"):
                async for event in follower:
                    assert event["type"] not in TERMINAL
            await until(lambda: not first.responses.running)
            forget(second.store)
            assert (await second.get(response_id)).json()["status"] == "failed"

    run(work)


def test_cancel_that_cannot_be_stored_is_a_503(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_run, "STORE_SECONDS", 0.0)

    async def work() -> None:
        async with servers(shared_url, SLOW) as (first, _):
            monkeypatch.setattr(first.store, "end", _fail)
            response_id = await first.begin()
            error = error_of(await first.client.post(f"{PATH}/{response_id}/cancel"), 503)
            assert "no space left" in error["message"]
            assert first.engine.running == first.state.num_running == 0

    run(work)


def test_server_that_stops_leaves_failed_responses_for_the_others(shared_url: str) -> None:
    async def work() -> None:
        async with servers(shared_url, SLOW) as (first, second):
            response_id = await first.begin()
            await first.responses.close()
            body = (await second.get(response_id)).json()
            assert body["status"] == "failed"
            assert "shut down" in body["error"]["message"]

    run(work)
