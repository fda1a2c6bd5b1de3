"""RemoteEngine over a stub that speaks vLLM's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

import pytest

from harmonium.engine import Request, Script, ScriptedEngine, Token, TokenEvent
from harmonium.engine.connect import Wanted, connect, parse_upstreams
from harmonium.engine.remote import RemoteEngine
from harmonium.engine.upstream import RemoteSettings
from harmonium.errors import (
    ConfigError,
    EngineBusy,
    EngineClosed,
    PromptTooLong,
    RequestError,
    UpstreamError,
    UpstreamUnavailable,
)
from harmonium.model.batch import SamplingParams
from tests.server.live import wait_until
from tests.vllm_stub import Stub, VllmServer, refusal

STOP = 200_002
T = TypeVar("T")
QUICK = RemoteSettings(check_seconds=0.05, start_seconds=5.0)


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    server = VllmServer()
    server.start()
    yield server
    server.close()


def run(
    urls: list[str],
    work: Callable[[RemoteEngine], Awaitable[T]],
    settings: RemoteSettings = QUICK,
    wanted: Wanted | None = None,
) -> T:
    """Connect, work, close."""

    async def all_of_it() -> T:
        upstreams = parse_upstreams(urls, settings)
        engine = await asyncio.wait_for(connect(upstreams, wanted or Wanted(), settings), 10)
        try:
            return await asyncio.wait_for(work(engine), 20)
        finally:
            await engine.close()

    return asyncio.run(all_of_it())


def request(*token_ids: int, **fields: Any) -> Request:
    sampling = SamplingParams(**fields.pop("sampling", {}))
    return Request("r/1", token_ids or (1, 2, 3), sampling, frozenset({STOP}), **fields)


async def collect(engine: RemoteEngine, asked: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(asked)]


def scripted(*tokens: int | Token, **fields: Any) -> Stub:
    return Stub(ScriptedEngine([Script(tokens, **fields)]))


def ids(events: list[TokenEvent]) -> list[int]:
    return [token.token_id for event in events for token in event.tokens]


def test_tokens_come_one_by_one_and_end_with_the_stop_token(server: VllmServer) -> None:
    stub = scripted(10, 11, STOP, 12)
    events = run([server.add(stub)], lambda engine: collect(engine, request()))
    assert ids(events) == [10, 11, STOP]
    assert [event.finish_reason for event in events] == [None, None, "stop"]
    assert stub.bodies[0]["stop_token_ids"] == [STOP] and stub.bodies[0]["ignore_eos"] is True


def test_every_sampling_parameter_is_passed_on(server: VllmServer) -> None:
    stub = scripted(10, STOP)
    sampling = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": (1 << 64) - 1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {5: 2.0},
        "max_tokens": 9,
    }
    asked = request(sampling=sampling, cache_salt="salt")
    run([server.add(stub)], lambda engine: collect(engine, asked))
    expected = {**sampling, "seed": (1 << 63) - 1, "logit_bias": {"5": 2.0}, "cache_salt": "salt"}
    assert {name: stub.bodies[0][name] for name in expected} == expected
    assert stub.bodies[0]["prompt"] == [1, 2, 3]


def test_without_a_limit_the_answer_may_fill_the_context(server: VllmServer) -> None:
    stub = scripted(10, STOP)
    stub.max_model_len = 100
    run([server.add(stub)], lambda engine: collect(engine, request()))
    assert stub.bodies[0]["max_tokens"] == 97
    with pytest.raises(PromptTooLong):
        run([server.add(stub)], lambda engine: collect(engine, request(*range(100))))
    assert len(stub.bodies) == 1


@pytest.mark.parametrize("num_top", [0, 1, 3])
def test_logprobs_and_alternatives_are_those_that_vllm_gave(server: VllmServer, num_top: int) -> None:
    unlikely = Token(10, -5.0, ((7, -0.5), (8, -1.0), (9, -2.0)))
    stub = scripted(unlikely, Token(STOP, -0.25, ((STOP, -0.25), (4, -2.0), (5, -3.0))))
    asked = request(sampling={"logprobs": num_top})
    tokens = [
        token for event in run([server.add(stub)], lambda e: collect(e, asked)) for token in event.tokens
    ]
    assert tokens[0] == Token(10, -5.0, unlikely.top_logprobs[:num_top])
    assert tokens[1] == Token(STOP, -0.25, ((STOP, -0.25), (4, -2.0), (5, -3.0))[:num_top])


def test_prompt_is_scored(server: VllmServer) -> None:
    stub = scripted(10)
    scores = run([server.add(stub)], lambda engine: engine.score((1, 2, 3), 1))
    assert scores == (Token(1), Token(2, 0.0, ((2, 0.0),)), Token(3, 0.0, ((3, 0.0),)))


def test_model_is_the_one_that_is_there_or_the_one_that_is_named(server: VllmServer) -> None:
    stub = Stub(ScriptedEngine([[10]]), model="gpt", root="openai/gpt-oss-20b", adapters=("poet",))
    url = server.add(stub)

    async def info(engine: RemoteEngine) -> Any:
        return engine.info

    for names in ((), ("gpt",), ("openai/gpt-oss-20b",)):
        found = run([url], info, wanted=Wanted(names))
        assert (found.model_name, found.engine, found.adapters) == ("gpt", "vllm", ("poet",))
    assert run([url], info, wanted=Wanted((), 5000)).context_length == 5000
    with pytest.raises(ConfigError, match=r"serves 'gpt' \(from 'openai/gpt-oss-20b'\), not 'other'"):
        run([url], info, wanted=Wanted(("other",)))


def test_adapter_is_asked_for_as_a_model(server: VllmServer) -> None:
    stub = scripted(10)
    stub.adapters = ("poet",)
    stub.engine = ScriptedEngine([[10]], info=_info_with("poet"))
    run([server.add(stub)], lambda engine: collect(engine, request(adapter="poet")))
    assert stub.bodies[0]["model"] == "poet"
    with pytest.raises(RequestError, match="no adapter 'other'"):
        run([server.add(stub)], lambda engine: collect(engine, request(adapter="other")))


def _info_with(*adapters: str) -> Any:
    from dataclasses import replace

    return replace(ScriptedEngine([[1]]).info, adapters=adapters)


def test_leaving_closes_the_upstreams_request(server: VllmServer) -> None:
    engine = ScriptedEngine([[10] * 5000], seconds_per_event=0.005)

    async def leave(remote: RemoteEngine) -> None:
        async with aclosing(remote.generate(request())) as events:
            await anext(events)
            assert engine.running == 1
        await asyncio.to_thread(wait_until, lambda: engine.running == 0)
        assert remote.statistics.upstreams[0].running == 0

    run([server.add(Stub(engine))], leave)
    assert engine.finished == ["aborted"]


def test_closing_ends_running_answers_with_aborted(server: VllmServer) -> None:
    engine = ScriptedEngine([[10] * 5000], seconds_per_event=0.005)

    async def close(remote: RemoteEngine) -> list[TokenEvent]:
        task = asyncio.create_task(collect(remote, request()))
        await asyncio.to_thread(wait_until, lambda: engine.running == 1)
        await remote.close()
        with pytest.raises(EngineClosed):
            remote.admit(request())
        return await task

    events = run([server.add(Stub(engine))], close)
    assert events[-1].finish_reason == "aborted"
    wait_until(lambda: engine.running == 0)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RequestError), (422, RequestError), (429, EngineBusy), (503, UpstreamUnavailable)],
)
def test_refusal_is_told_with_its_kind(server: VllmServer, status: int, kind: type[Exception]) -> None:
    stub = scripted(10)
    stub.refusals = [refusal(status, "because", **{"retry-after": "7"})]
    with pytest.raises(kind) as caught:
        run([server.add(stub)], lambda engine: collect(engine, request()))
    if status < 429:
        assert "because" in str(caught.value)
    if status == 429:
        assert getattr(caught.value, "retry_after_seconds") == 7.0  # noqa: B009


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_refusal_before_the_first_token_is_met_by_another_upstream(server: VllmServer, status: int) -> None:
    stubs = [scripted(10, STOP), scripted(10, STOP)]
    for stub in stubs:
        stub.refusals = []
    urls = [server.add(stub) for stub in stubs]

    async def ask(engine: RemoteEngine) -> int:
        for _ in range(8):
            for stub in stubs:
                stub.refusals = [refusal(status, "no")] if stub is stubs[0] else []
            assert ids(await collect(engine, request())) == [10, STOP]
        return engine.statistics.retries

    run(urls, ask)
    assert len(stubs[1].bodies) == 8


def test_failure_after_the_first_token_is_an_error_and_no_second_try(server: VllmServer) -> None:
    stubs = [scripted(10, error="broken"), scripted(10, error="broken")]
    urls = [server.add(stub) for stub in stubs]

    async def ask(engine: RemoteEngine) -> None:
        events = engine.generate(request())
        assert (await anext(events)).tokens[0].token_id == 10
        with pytest.raises(Exception, match="broken"):
            await anext(events)

    run(urls, ask)
    assert len(stubs[0].bodies) + len(stubs[1].bodies) == 1


def test_upstream_that_is_down_is_ejected_and_comes_back(server: VllmServer) -> None:
    stubs = [scripted(10, STOP), scripted(10, STOP)]
    urls = [server.add(stub) for stub in stubs]

    async def flap(engine: RemoteEngine) -> None:
        def up() -> list[bool]:
            return [upstream.is_up for upstream in engine.statistics.upstreams]

        assert up() == [True, True]
        stubs[0].status = 503
        await asyncio.to_thread(wait_until, lambda: up() == [False, True])
        for _ in range(4):
            await collect(engine, request())
        assert (len(stubs[0].bodies), len(stubs[1].bodies)) == (0, 4)
        stubs[1].status = 500
        await asyncio.to_thread(wait_until, lambda: up() == [False, False])
        with pytest.raises(UpstreamUnavailable):
            engine.admit(request())
        stubs[0].status = 200
        await asyncio.to_thread(wait_until, lambda: up() == [True, False])
        await collect(engine, request())
        assert len(stubs[0].bodies) == 1

    run(urls, flap)


def test_upstream_that_comes_back_with_another_model_stays_out(server: VllmServer) -> None:
    stub = scripted(10, STOP)

    async def swap(engine: RemoteEngine) -> None:
        stub.status = 503
        await asyncio.to_thread(wait_until, lambda: not engine.statistics.upstreams[0].is_up)
        stub.model, stub.status = "another", 200
        await asyncio.sleep(0.3)
        assert not engine.statistics.upstreams[0].is_up
        stub.model = "scripted"
        await asyncio.to_thread(wait_until, lambda: engine.statistics.upstreams[0].is_up)

    run([server.add(stub)], swap)


def test_key_is_sent_and_a_wrong_one_is_told_at_the_start(server: VllmServer) -> None:
    stub = scripted(10, STOP)
    stub.key = "secret"
    url = server.add(stub)
    with pytest.raises(ConfigError, match="HARMONIUM_VLLM_API_KEY"):
        run([url], lambda engine: collect(engine, request()))
    keyed = RemoteSettings(check_seconds=0.05, api_key="secret")
    assert ids(run([url], lambda engine: collect(engine, request()), keyed)) == [10, STOP]


def test_no_server_within_the_time_is_an_error_with_the_reason() -> None:
    quick = RemoteSettings(start_seconds=0.1)
    with pytest.raises(UpstreamUnavailable, match=r"http://127\.0\.0\.1:1: "):
        run(["http://127.0.0.1:1"], lambda engine: collect(engine, request()), quick)


@pytest.mark.parametrize(
    "text",
    ["", "host:8000", "ftp://host", "http://", "http://a b", "http://h/?q=1", "http://u:p@h", "http://h:x"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"address|expected"):
        parse_upstreams([text], QUICK)


def test_one_address_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_upstreams(["http://h:1", "http://h:1/"], QUICK)


def test_silent_upstream_ends_with_an_error(server: VllmServer) -> None:
    stub = scripted(10, 11, 12, seconds_per_event=30.0)
    quick = RemoteSettings(first_token_seconds=0.2)
    with pytest.raises(UpstreamError, match="too long"):
        run([server.add(stub)], lambda engine: collect(engine, request()), quick)
