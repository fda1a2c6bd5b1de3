"""Spans of requests: their shape, what they say, and what they never say."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from harmonium.engine import LocalEngine
from harmonium.errors import ConfigError
from harmonium.server import ServerConfig, ServerState
from harmonium.server.tracing import Tracing, find_tracing
from tests.engine.serving import make_engine
from tests.scripted_chat import gen
from tests.server.client import HELLO, call, chat, make_state

pytest.importorskip("opentelemetry.sdk", reason="the extra [otel] is not installed")

ANSWER = "<|channel|>final<|message|>SECRET ANSWER<|return|>"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_SDK_DISABLED",
        "OTEL_SERVICE_NAME",
    ):
        monkeypatch.delenv(name, raising=False)


def trace_into_memory(state: ServerState) -> Any:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    state.tracing = Tracing(exporter, SimpleSpanProcessor)
    return exporter


def by_name(exporter: Any) -> dict[str, Any]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_request_turn_and_phases_are_nested_and_continue_the_clients_trace(stream: bool) -> None:
    state = make_state(ANSWER)
    exporter = trace_into_memory(state)
    body = {"messages": [{"role": "user", "content": "SECRET QUESTION"}], "stream": stream, "max_tokens": 50}
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    assert call(state, "POST", "/v1/chat/completions", json=body, headers=headers).status_code == 200
    spans = by_name(exporter)
    assert set(spans) == {"POST /v1/chat/completions", "chat scripted", "prepare", "prefill", "decode"}
    root, turn = spans["POST /v1/chat/completions"], spans["chat scripted"]
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == SPAN
    assert turn.parent.span_id == root.context.span_id
    assert all(
        spans[name].parent.span_id == turn.context.span_id for name in ("prepare", "prefill", "decode")
    )
    assert root.attributes["http.response.status_code"] == 200
    said = turn.attributes
    assert said["gen_ai.request.model"] == "scripted" and said["gen_ai.request.max_tokens"] == 50
    assert said["gen_ai.response.finish_reasons"] == ("stop",)
    assert said["gen_ai.usage.input_tokens"] > 10 and said["gen_ai.usage.output_tokens"] == len(gen(ANSWER))
    assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]
    assert spans["prepare"].start_time <= spans["decode"].start_time <= spans["decode"].end_time
    assert not any("SECRET" in span.to_json() for span in exporter.get_finished_spans())


def test_refused_request_has_a_span_with_its_status_and_health_has_none() -> None:
    state = make_state(ANSWER)
    exporter = trace_into_memory(state)
    assert chat(state, top_p=9).status_code == 400
    assert call(state, "GET", "/health").status_code == 200
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/chat/completions" and span.attributes["http.response.status_code"] == 400


def test_completion_through_a_queue_says_how_long_it_waited() -> None:
    engine = make_engine()
    assert isinstance(engine, LocalEngine)
    state = ServerState(ServerConfig(), engine)
    exporter = trace_into_memory(state)
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}
    try:
        assert call(state, "POST", "/v1/completions", json=body).status_code == 200
    finally:
        asyncio.run(engine.close())
    spans = by_name(exporter)
    assert set(spans) == {
        "POST /v1/completions", "text_completion fake", "prepare", "queue", "prefill", "decode"
    }  # fmt: skip
    assert spans["text_completion fake"].attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert spans["queue"].end_time <= spans["prefill"].end_time <= spans["decode"].end_time


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A collector's address, and what was posted there: (path, body)."""
    posts: list[tuple[str, bytes]] = []

    class Collect(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posts.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collect)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", posts
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("source", ["option", "environment"])
def test_spans_reach_a_collector_over_http(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(ANSWER)
    with collector() as (address, posts):
        if source == "environment":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        state.tracing = find_tracing(address if source == "option" else None)
        assert state.tracing is not None
        assert chat(state, HELLO).status_code == 200
        state.tracing.close()
    assert {path for path, _ in posts} == {"/v1/traces"}
    sent = b"".join(body for _, body in posts)
    assert b"gen_ai.usage.input_tokens" in sent and b"service.name" in sent and b"SECRET" not in sent


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert find_tracing(None) is None


def test_missing_extra_and_wrong_address_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'localhost:4318'; expected such as http://localhost:4318"):
        find_tracing("localhost:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r'pip install "harmonium\[otel\]"'):
        find_tracing("http://localhost:4318")
