"""OpenTelemetry spans: one a request, under it one a turn of the model, under that its phases.

    POST /v1/chat/completions          server span; continues the client's traceparent
      chat gpt-oss-20b                 gen_ai attributes: model, tokens, time to first token, finish reason
        prepare, queue, prefill, decode

Nothing of what a request or an answer says is in them. Without an endpoint nothing is imported, and a request
costs one comparison. Source of names: OpenTelemetry's semantic conventions for HTTP and generative AI, and
for latencies vllm-project/vllm:vllm/tracing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from harmonium.config import environment_tracing
from harmonium.engine.protocol import Engine, EngineInfo, Request, TokenEvent
from harmonium.errors import ConfigError
from harmonium.model.batch import SamplingParams

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from starlette.types import Scope

_UNTRACED = frozenset({"/health", "/ready", "/metrics"})
_request_span: ContextVar[Span | None] = ContextVar("harmonium_request_span", default=None)


def find_tracing(endpoint: str | None) -> Tracing | None:
    """Tracing to this collector, or to the one of OpenTelemetry's environment variables; None without any.

    endpoint: as --otlp-endpoint gives it; an address without a path gets /v1/traces. Raises ConfigError for
    an address that is none, and when the extra [otel] is not installed.
    """
    found = environment_tracing()
    source = endpoint if endpoint is not None else found.endpoint
    if found.is_disabled or source is None:
        return None
    parts = urlsplit(source)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the OTLP endpoint is {source[:200]!r}; expected such as http://localhost:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"an OTLP endpoint is set but {error.name} is not installed; "
            'pip install "harmonium[otel]", or unset it'
        ) from None
    if endpoint is not None and parts.path in ("", "/"):
        endpoint = f"{endpoint.rstrip('/')}/v1/traces"
    # Without an address of ours the exporter reads the environment itself, by OpenTelemetry's rules.
    return Tracing(OTLPSpanExporter(endpoint=endpoint), BatchSpanProcessor)


class Tracing:
    """Makes spans and hands them to an exporter.

    processor: how they get there, such as BatchSpanProcessor (a thread of its own).
    """

    def __init__(self, exporter: SpanExporter, processor: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": environment_tracing().service_name})
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor(exporter))
        self._tracer = self._provider.get_tracer("harmonium")
        self._propagator = TraceContextTextMapPropagator()
        self._api = trace

    @contextmanager
    def request(self, scope: Scope, request_id: str) -> Iterator[Span]:
        """The span of an HTTP request; that of its turns hang under it."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] in _UNTRACED:
            yield self._api.INVALID_SPAN
            return
        span = self._tracer.start_span(
            scope["method"],
            context=self._propagator.extract(headers),
            kind=self._api.SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "harmonium.request_id": request_id,
            },
        )
        token = _request_span.set(span)
        try:
            yield span
        finally:
            _request_span.reset(token)
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                span.set_attribute("http.route", route)
                span.update_name(f"{scope['method']} {route}")
            span.end()

    @contextmanager
    def turn(self, engine: Engine, operation: str, sampling: SamplingParams) -> Iterator[Engine]:
        """An engine that notes when things happen; on leaving, the turn's span and those of its phases."""
        traced = _TracedEngine(engine)
        parent = _request_span.get()
        context = None if parent is None else self._api.set_span_in_context(parent)
        span = self._tracer.start_span(
            f"{operation} {engine.info.model_name}",
            context=context,
            attributes={"gen_ai.operation.name": operation, **_asked(engine.info, sampling)},
        )
        try:
            yield traced
        finally:
            end = time.monotonic()
            span.set_attributes(traced.attributes(end))
            if traced.finish_reason == "error":
                span.set_status(self._api.StatusCode.ERROR)
            for name, begins, ends in traced.phases(end):
                phase = self._tracer.start_span(
                    name, context=self._api.set_span_in_context(span), start_time=_clock(begins)
                )
                phase.end(_clock(ends))
            span.end()

    def close(self) -> None:
        """Send what is left. Blocks for a few seconds at most."""
        self._provider.shutdown()


def _clock(moment: float) -> int:
    """time.monotonic() -> nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)


def _asked(info: EngineInfo, sampling: SamplingParams) -> dict[str, Any]:
    asked = {
        "gen_ai.provider.name": "harmonium",
        "gen_ai.request.model": info.model_name,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.seed": sampling.seed,
    }
    return {name: value for name, value in asked.items() if value is not None}


class _TracedEngine:
    """An engine's face for one request. Times are those of time.monotonic()."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._opened = time.monotonic()
        self._admitted: float | None = None
        self._began: float | None = None
        self._first: float | None = None
        self._num_tokens = self._num_cached = 0
        self.request: Request | None = None
        self.finish_reason = "abort"

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def admit(self, request: Request) -> None:
        self._engine.admit(request)
        self.request = request
        self._admitted = time.monotonic()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        async with aclosing(self._engine.generate(request)) as events:
            async for event in events:
                self._see(event)
                yield event

    async def close(self) -> None:
        await self._engine.close()

    def _see(self, event: TokenEvent) -> None:
        self._began = self._began if self._began is not None else event.began
        if event.tokens and self._first is None:
            self._first = time.monotonic()
        self._num_tokens += len(event.tokens)
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        self.finish_reason = event.finish_reason or self.finish_reason

    def attributes(self, end: float) -> dict[str, Any]:
        """What the turn's span says of its end."""
        found: dict[str, Any] = {"gen_ai.latency.e2e": end - self._opened}
        if self.request is None:
            return found
        found |= {
            "gen_ai.response.model": self.info.model_name
            if self.request.adapter is None
            else self.request.adapter,
            "gen_ai.response.id": self.request.request_id,
            "gen_ai.response.finish_reasons": [self.finish_reason],
            "gen_ai.usage.input_tokens": len(self.request.token_ids),
            "gen_ai.usage.output_tokens": self._num_tokens,
            "gen_ai.usage.cache_read.input_tokens": self._num_cached,
        }
        if self._first is not None:
            found["gen_ai.latency.time_to_first_token"] = self._first - self._opened
        return found

    def phases(self, end: float) -> Iterator[tuple[str, float, float]]:
        """(name, begin, end). prepare: rendering and compiling the grammar. An engine that does not say when
        it began has no queue. A phase that the turn did not live to see the end of ends with it.
        """
        admitted = end if self._admitted is None else self._admitted
        yield "prepare", self._opened, admitted
        if self._admitted is None:
            return
        first = end if self._first is None else self._first
        if self._began is not None:
            yield "queue", admitted, max(admitted, self._began)
            yield "prefill", max(admitted, self._began), first
        else:
            yield ("prefill" if self._first is not None else "queue"), admitted, first
        if self._first is not None:
            yield "decode", first, end
