"""The metrics of the server in the format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from MyGPT.serving.models import ServedModel
from MyGPT.serving.wire import Exchange

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SPEED_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_ENGINE = {
    "running": (GaugeMetricFamily, "mygpt_requests_running", "Texts that are being generated"),
    "waiting": (GaugeMetricFamily, "mygpt_queue_length", "Texts that wait for a slot"),
    "slots": (GaugeMetricFamily, "mygpt_slots", "Texts that can be generated at the same time"),
    "cache_tokens": (GaugeMetricFamily, "mygpt_cache_tokens", "Tokens in the key-value cache"),
    "cache_capacity": (GaugeMetricFamily, "mygpt_cache_capacity_tokens", "Tokens that fit into the key-value cache"),
    "requests": (CounterMetricFamily, "mygpt_texts", "Texts that were requested"),
    "prompt_tokens": (CounterMetricFamily, "mygpt_prompt_tokens", "Prompt tokens that were computed"),
    "reused_tokens": (
        CounterMetricFamily,
        "mygpt_reused_prompt_tokens",
        "Prompt tokens that were taken from the cache",
    ),
    "generated_tokens": (CounterMetricFamily, "mygpt_generated_tokens", "New tokens"),
    "steps": (CounterMetricFamily, "mygpt_engine_steps", "Steps of the engine"),
}
"""For each key of Engine.stats: the kind, the name and the description of its metric."""


class Metrics:
    """The metrics of a server, in a registry of its own."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(list(models)))
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "mygpt_http_requests", "HTTP requests that have ended", ["path", "status"], registry=self.registry
        )
        self.durations = Histogram(
            "mygpt_http_request_duration_seconds", "Time from the headers of a request to the end of its response", ["path"],
            registry=self.registry, buckets=DURATION_BUCKETS,
        )  # fmt: skip
        self.first_tokens = Histogram(
            "mygpt_time_to_first_token_seconds", "Time from the submission of a text to its first new token", ["model"],
            registry=self.registry, buckets=FIRST_TOKEN_BUCKETS,
        )  # fmt: skip
        self.speeds = Histogram(
            "mygpt_tokens_per_second", "New tokens per second of one text, after its first token", ["model"],
            registry=self.registry, buckets=SPEED_BUCKETS,
        )  # fmt: skip

    def record(self, route: str, status: int, duration: float, exchange: Exchange) -> None:
        """Record an HTTP request that has ended. `route` is the pattern of its path: every distinct label is a time series."""
        self.requests.labels(route, str(status)).inc()
        self.durations.labels(route).observe(duration)
        now = time.monotonic()
        for generation in exchange.generations:
            if generation.first_token is not None:
                self.first_tokens.labels(exchange.model).observe(generation.first_token - generation.submitted)
                seconds = (generation.finished or now) - generation.first_token
                if len(generation.tokens) > 1 and seconds > 0:
                    self.speeds.labels(exchange.model).observe((len(generation.tokens) - 1) / seconds)


class EngineCollector(Collector):
    """A collector that reads Engine.stats of all models whenever the metrics are requested."""

    def __init__(self, models: list[ServedModel]) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        """Yield each metric with its value for every model."""
        stats = {model.name: model.engine.stats() for model in self.models}
        for key, (kind, name, text) in _ENGINE.items():
            metric = kind(name, text, labels=["model"])
            for model, values in stats.items():
                metric.add_metric([model], values[key])
            yield metric
