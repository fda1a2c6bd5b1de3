"""Counts and times for Prometheus, at /metrics.

Where the meaning is the same the names are those of vLLM's server, so that dashboards made for it work.
Source of names: vllm-project/vllm:docs/design/metrics.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from harmonium.engine.remote import RemoteStatistics
from harmonium.engine.statistics import EngineStatistics

if TYPE_CHECKING:
    from harmonium.server.state import ServerState

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1, 2.5)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The registry of one server. Attributes are counters and histograms to be told of what happens."""

    def __init__(self, state: ServerState) -> None:
        self._registry = registry = _NamedRegistry(state)
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens of answers.", registry=registry)
        self.generation_tokens = Counter(
            "vllm:generation_tokens", "Tokens that were written.", registry=registry
        )
        self.cached_tokens = Counter(
            "vllm:prefix_cache_hits", "Prompt tokens from the cache.", registry=registry
        )
        self.queried_tokens = Counter(
            "vllm:prefix_cache_queries", "Prompt tokens that were looked up in the cache.", registry=registry
        )
        self.finished = Counter(
            "vllm:request_success", "Answers that ended.", ["finished_reason"], registry=registry
        )
        self.adapter_requests = Counter(
            "harmonium:lora_requests", "Answers of LoRA adapters.", ["lora_name"], registry=registry
        )
        self.refused = Counter("harmonium:requests_refused", "Answers refused with 429.", registry=registry)
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From admission to the first text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time of a token after the first, of each answer.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "vllm:inter_token_latency_seconds",
            "Time between the tokens that a client sees.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.answer_seconds = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From admission to the end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.responses = Counter(
            "harmonium:http_responses", "HTTP answers.", ["path", "status"], registry=registry
        )
        registry.register(_EngineCollector(state))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _NamedRegistry(CollectorRegistry):
    """Gives vLLM's metrics the label `model_name`, by which dashboards choose."""

    def __init__(self, state: ServerState) -> None:
        super().__init__()
        self._state = state

    def collect(self) -> Iterator[Metric]:
        name = next(iter(self._state.model_names), "")
        for metric in super().collect():
            if metric.name.startswith("vllm:"):
                metric.samples = [
                    sample._replace(labels={"model_name": name, **sample.labels}) for sample in metric.samples
                ]
            yield metric


class _EngineCollector:
    """Reads the engine's own books when somebody looks."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        yield GaugeMetricFamily("vllm:num_requests_running", "Answers that run.", state.num_running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Answers that wait.", state.num_waiting)
        yield GaugeMetricFamily("harmonium:ready", "1 when requests are served.", state.status == "ready")
        if state.adapter_names:
            yield _adapter_gauge(state)
        statistics = getattr(state.loaded_engine, "statistics", None)
        if isinstance(statistics, RemoteStatistics):
            yield from _upstream_metrics(statistics)
        if not isinstance(statistics, EngineStatistics):
            return
        used, free = statistics.full_blocks_used, statistics.full_blocks_free + statistics.full_blocks_cached
        share = used / (used + free) if used + free else 0.0
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the cache in use, 0 to 1.", share)
        yield CounterMetricFamily("vllm:num_preemptions", "Preemptions.", statistics.num_preemptions)
        yield CounterMetricFamily(
            "harmonium:grammar_seconds", "Time that steps waited for masks.", statistics.constraint_seconds
        )
        yield CounterMetricFamily(
            "harmonium:forced_tokens", "Tokens that the grammar put.", statistics.num_forced_tokens
        )
        yield from _draft_metrics(statistics)
        yield from _expert_metrics(statistics)
        yield CounterMetricFamily("harmonium:engine_steps", "Steps of the engine.", statistics.num_steps)
        yield GaugeMetricFamily(
            "harmonium:window_blocks_used",
            "Cache blocks of window layers in use.",
            statistics.window_blocks_used,
        )


def _draft_metrics(statistics: EngineStatistics) -> Iterator[Metric]:
    """Guesses ahead, under vLLM's names for them."""
    for name, text, value in (
        ("num_drafts", "Guesses.", statistics.num_drafts),
        ("num_draft_tokens", "Tokens guessed.", statistics.num_draft_tokens),
        ("num_accepted_tokens", "Guessed tokens that came true.", statistics.num_accepted_draft_tokens),
    ):
        yield CounterMetricFamily(f"vllm:spec_decode_{name}", text, value)


def _expert_metrics(statistics: EngineStatistics) -> Iterator[Metric]:
    """Experts that are streamed from the disk; nothing where they are not."""
    counts = statistics.experts
    if counts is None:
        return
    for name, text, value in (
        ("hits", "Experts that a layer needed and that were in memory.", counts.hits),
        ("late_hits", "Experts that were being read ahead when they were needed.", counts.late_hits),
        ("misses", "Experts that had to be read.", counts.misses),
        ("guesses", "Experts read ahead of need.", counts.guesses),
        ("true_guesses", "Experts read ahead that were then needed.", counts.true_guesses),
        ("read_bytes", "Read from the disk for experts.", counts.bytes_read),
        ("wait_seconds", "Time that steps stood still for reads.", counts.wait_seconds),
    ):
        yield CounterMetricFamily(f"harmonium:expert_{name}", text, value)


def _upstream_metrics(statistics: RemoteStatistics) -> Iterator[Metric]:
    """The vLLM servers that compute for us, each by its address."""
    yield CounterMetricFamily(
        "harmonium:upstream_retries", "Requests sent to another upstream.", statistics.retries
    )
    yield CounterMetricFamily(
        "harmonium:upstream_resumed", "Answers that went on elsewhere.", statistics.resumed
    )
    yield CounterMetricFamily(
        "harmonium:grammar_corrections", "Times that an answer left its grammar.", statistics.corrections
    )
    gauges = [
        GaugeMetricFamily("harmonium:upstream_up", "1 when it gets requests.", labels=("upstream",)),
        GaugeMetricFamily("harmonium:upstream_running", "Requests on it.", labels=("upstream",)),
    ]
    counters = [
        CounterMetricFamily("harmonium:upstream_requests", "Requests sent to it.", labels=("upstream",)),
        CounterMetricFamily("harmonium:upstream_failures", "Requests it broke.", labels=("upstream",)),
        CounterMetricFamily("harmonium:upstream_ejections", "Times it was taken out.", labels=("upstream",)),
    ]
    for one in statistics.upstreams:
        for gauge, value in zip(gauges, (one.is_up, one.running), strict=True):
            gauge.add_metric((one.url,), value)
        for counter, count in zip(counters, (one.requests, one.failures, one.ejections), strict=True):
            counter.add_metric((one.url,), count)
    yield from gauges
    yield from counters


def _adapter_gauge(state: ServerState) -> Metric:
    """What routers that know adapters look at: its labels say it, its value is the time.

    Source: vllm-project/vllm: vllm/v1/metrics/loggers.py.
    """
    gauge = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "LoRA adapters of answers that run or wait.",
        labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
    )
    running = ",".join(state.held_adapters)
    gauge.add_metric((str(len(state.adapter_names)), "", running), time.time())
    return gauge
