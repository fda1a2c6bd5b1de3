"""What vLLM may send: whole, cut, late, malformed; there are tokens or one clear error, and no hang."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonium.engine import Request, TokenEvent
from harmonium.engine.http_exchange import parse_address
from harmonium.engine.protocol import EngineInfo
from harmonium.engine.remote import RemoteEngine
from harmonium.engine.upstream import RemoteSettings, Upstream
from harmonium.engine.vllm_wire import RefusedError, read_chunk, read_models, read_scores
from harmonium.errors import HarmoniumError, UpstreamError
from harmonium.model.batch import SamplingParams

INFO = EngineInfo("m", 1000, 201_088, "vllm")
QUICK = RemoteSettings(connect_seconds=1.0, first_token_seconds=0.5, token_seconds=0.5)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(*token_ids: Any, reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": "x", "token_ids": list(token_ids), "finish_reason": reason, **more}
    return b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode()


def chunked(*pieces: bytes, ends: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + body + (b"0\r\n\r\n" if ends else b"")


DONE = b"data: [DONE]\n\n"


def ask(raw: bytes, hold: bool = False, max_tokens: int = 50) -> list[TokenEvent]:
    """The events that these bytes on the wire make. hold: the connection stays open behind them."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        try:
            if hold:
                await reader.read()
                await asyncio.sleep(0)
        finally:
            writer.close()

    async def run() -> list[TokenEvent]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            upstream = Upstream(parse_address(f"http://127.0.0.1:{port}"), QUICK, is_up=True)
            engine = RemoteEngine([upstream], INFO, QUICK)
            request = Request("r", (1,), SamplingParams(max_tokens=max_tokens))
            try:
                return [each async for each in engine.generate(request)]
            finally:
                assert upstream.running == 0 and not upstream._exchanges
                await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 10))


def ids(events: list[TokenEvent]) -> list[int]:
    return [token.token_id for each in events for token in each.tokens]


def test_stream_is_read_however_it_is_cut_into_pieces() -> None:
    body = b": ping\n\nevent: x\r\n" + event(5) + event(6, reason="stop") + DONE
    for size in (1, 7, 1000):
        pieces = [body[place : place + size] for place in range(0, len(body), size)]
        events = ask(chunked(*pieces))
        assert (ids(events), events[-1].finish_reason) == ([5, 6], "stop")


def test_cached_tokens_come_with_the_last_event() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 48}}}
    last = b"data: %b\n\n" % json.dumps(usage).encode()
    assert ask(chunked(event(5), event(6, reason="length"), last, DONE))[-1] == TokenEvent(
        ask(chunked(event(6, reason="length"), DONE))[-1].tokens, "length", 48
    )


def test_stream_need_not_say_done() -> None:
    assert ids(ask(chunked(event(5, reason="stop")))) == [5]


MALFORMED = {
    "cut in the middle": chunked(event(5), ends=False),
    "ends early": chunked(event(5)),
    "no JSON": chunked(b"data: {]\n\n"),
    "no object": chunked(b"data: [1]\n\n"),
    "deep JSON": chunked(b"data: " + b"[" * 100_000 + b"\n\n"),
    "no choices": chunked(b'data: {"a": 1}\n\n'),
    "two choices": chunked(b'data: {"choices": [{}, {}]}\n\n'),
    "no token ids": chunked(b'data: {"choices": [{"index": 0, "text": "hello"}]}\n\n'),
    "a token out of range": chunked(event(201_088)),
    "a negative token": chunked(event(-1)),
    "a token that is text": chunked(event("5")),
    "a token that is true": chunked(event(True)),
    "a reason that is a number": chunked(event(5, reason=3)),  # type: ignore[arg-type]
    "an unknown reason": chunked(event(5, reason="repetition"), DONE),
    "aborted": chunked(event(5, reason="abort"), DONE),
    "tokens behind the end": chunked(event(5, reason="stop"), event(6), DONE),
    "more tokens than asked for": chunked(event(*range(51)), DONE),
    "no HTTP": b"SSH-2.0-OpenSSH_9\r\n\r\n",
    "nothing": b"",
    "half a head": HEAD[:20],
    "an endless line": chunked(b"data: " + b"x" * (9 << 20)),
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
    "an error": chunked(event(5), b'data: {"error": {"message": "oops", "code": 500}}\n\n', DONE),
    "an error that is text": chunked(b'data: {"error": "oops"}\n\n', DONE),
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_answer_is_one_clear_error(raw: bytes) -> None:
    with pytest.raises(HarmoniumError) as caught:
        ask(raw)
    assert caught.value.status in (500, 502, 503)


@pytest.mark.parametrize(
    "raw", [b"", HEAD, chunked(event(5), ends=False), chunked(b": ping\n\n", ends=False)]
)
def test_silence_ends(raw: bytes) -> None:
    with pytest.raises(UpstreamError):
        ask(raw, hold=True)


def test_comments_do_not_keep_a_request_without_tokens_alive() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        try:
            while True:
                writer.write(b"8\r\n: ping\n\n\r\n")
                await asyncio.sleep(0.02)
        finally:
            writer.transport.abort()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            upstream = Upstream(parse_address(f"http://127.0.0.1:{port}"), QUICK, is_up=True)
            engine = RemoteEngine([upstream], INFO, QUICK)
            with pytest.raises(UpstreamError, match="too long"):
                async for _ in engine.generate(Request("r", (1,))):
                    pass
            await engine.close()

    asyncio.run(asyncio.wait_for(run(), 10))


KEYS = (
    "choices token_ids logprobs finish_reason usage error code data id token_logprobs top_logprobs "
    "prompt_logprobs logprob text parent message"
)

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS.split()),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.sampled_from([None, 0, 2]))
def test_any_json_is_a_chunk_or_a_clear_error(value: Any, num_top: int | None) -> None:
    data = json.dumps(value).encode()
    for read in (
        lambda: read_chunk(data, num_top, 201_088),
        lambda: read_models(data),
        lambda: read_scores(data, (1, 2), 1),
    ):
        with contextlib.suppress(UpstreamError, RefusedError):
            read()


@pytest.mark.parametrize("turns", range(6))
def test_cancellation_that_comes_together_with_a_token_is_not_lost(turns: int) -> None:
    """asyncio.wait_for of Python 3.10 and 3.11 loses it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        try:
            await reader.read(-1)
        finally:
            writer.transport.abort()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            upstream = Upstream(parse_address(f"http://127.0.0.1:{port}"), is_up=True)
            engine = RemoteEngine([upstream], INFO)
            request = Request("r", (1,))
            task = asyncio.create_task(collect(engine, request))
            while not upstream._exchanges or not next(iter(upstream._exchanges)).status:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            piece = event(5)
            next(iter(upstream._exchanges))._reader.feed_data(b"%x\r\n%b\r\n" % (len(piece), piece))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=5)
            assert task.cancelled()
            assert upstream.running == 0
            await engine.close()

    asyncio.run(run())


async def collect(engine: RemoteEngine, request: Request) -> list[TokenEvent]:
    return [each async for each in engine.generate(request)]
