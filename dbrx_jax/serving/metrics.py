"""Metrics in Prometheus' format, with vLLM's names where they mean the same."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from dbrx_jax.serving.engine_interface import Engine

# Seconds; vLLM's, so that its dashboards fit.
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LABELS = ("model_name", "engine")


class Metrics:
    """The metrics of one server: histograms that it observes, and the engine's counts when they are asked for.

    Attributes:
      first_token, inter_token, request: seconds until the first token, between tokens, and of whole requests.
    """

    def __init__(self, engine: "Engine", model_name: str):
        self._registry = CollectorRegistry()
        self._labels = (model_name, "0")

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            metric = Histogram(name, text, LABELS, registry=self._registry, buckets=tuple(buckets))
            return metric.labels(*self._labels)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "Time to the first token in seconds.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = histogram(
            "vllm:inter_token_latency_seconds", "Time between tokens in seconds.", TOKEN_BUCKETS
        )
        self.request = histogram(
            "vllm:e2e_request_latency_seconds", "Time of a whole request in seconds.", REQUEST_BUCKETS
        )
        self._finished = Counter(
            "vllm:request_success", "Completions that ended.", (*LABELS, "finished_reason"), registry=self._registry
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(*self._labels, reason)
        self._responses = Counter(
            "http_requests", "Requests by their answers.", ("method", "handler", "status"), registry=self._registry
        )
        self._registry.register(_EngineCollector(engine, self._labels))

    def count_finished(self, reason: str, count: int = 1) -> None:
        """Counts completions that ended with a reason: stop, length, abort or error."""
        self._finished.labels(*self._labels, reason).inc(count)

    def count_response(self, method: str, handler: str, status: int) -> None:
        """Counts an answer; the handler is a route, so that no client can make more rows."""
        self._responses.labels(method, handler, str(status)).inc()

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's counts when the metrics are asked for."""

    def __init__(self, engine: "Engine", labels: tuple[str, str]):
        self._engine, self._labels = engine, labels

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used = stats.blocks - stats.free_blocks
        gauges = (
            ("vllm:num_requests_running", "Requests that run.", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Used blocks of the cache, from 0 to 1.", used / max(1, stats.blocks)),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        counters = (
            ("vllm:prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("vllm:generation_tokens", "New tokens.", stats.generation_tokens),
            ("vllm:prefix_cache_queries", "Tokens of prompts sought in the cache.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Tokens of prompts found in the cache.", stats.prefix_hits),
            ("vllm:num_preemptions", "Requests that lost their blocks to others, and began anew.", stats.preemptions),
            ("vllm:spec_decode_num_draft_tokens", "Tokens proposed by speculation.", stats.proposed_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.", stats.accepted_tokens),
            (
                "dbrx_jax:compilations_after_warmup",
                "Programs compiled while requests ran.",
                stats.compilations_after_warmup,
            ),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
