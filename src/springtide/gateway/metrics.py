"""What a gateway counts, in Prometheus' terms. Labels are model names that exist, replicas and outcomes: never
anything that a client makes up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from springtide.core.cluster import Replica
from springtide.core.request import Outcome, Usage

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class ModelMetrics:
    """The series of one model, looked up once: a label costs more than an increment."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        outcomes: tuple[Outcome, ...] = ("finished", "failed", "cancelled")
        self._requests = {outcome: metrics.requests.labels(model, outcome) for outcome in outcomes}
        self._prompt = metrics.prompt_tokens.labels(model)
        self._completion = metrics.completion_tokens.labels(model)
        self._cached = metrics.cached_tokens.labels(model)
        self._ttft = metrics.ttft.labels(model)
        self._tpot = metrics.tpot.labels(model)

    def observe(self, usage: Usage) -> None:
        """Count one request that is over."""
        self._requests[usage.outcome].inc()
        self._prompt.inc(usage.prompt_tokens)
        self._completion.inc(usage.completion_tokens)
        self._cached.inc(usage.cached_tokens)
        if usage.first_token_s is not None:
            self._ttft.observe(usage.first_token_s)
            if usage.outcome == "finished" and usage.completion_tokens > 1:
                decoding = usage.finished - usage.created - usage.first_token_s
                self._tpot.observe(decoding / (usage.completion_tokens - 1))


class Metrics:
    """All series of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests that are over", "model", "outcome")
        self.rejected = self._counter("rejected", "Requests refused at admission", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens", "model")
        self.completion_tokens = self._counter("completion_tokens", "Tokens generated", "model")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens that were cached", "model")
        self.chunks = self._counter("sse_chunks", "Chunks of streamed answers")
        self.heartbeats = self._counter("sse_heartbeats", "Comments sent to clients that wait")
        self.ttft = self._histogram("ttft_seconds", "Time to first token", _TTFT_BUCKETS)
        self.tpot = self._histogram("tpot_seconds", "Time per output token after the first", _TPOT_BUCKETS)
        self._models: dict[str, ModelMetrics] = {}

    def model(self, name: str) -> ModelMetrics:
        known = self._models.get(name)
        if known is None:
            known = self._models[name] = ModelMetrics(self, name)
        return known

    def watch(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Also show what `collect` says at the time of reading."""
        self.registry.register(_AtReading(collect))

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"springtide_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"springtide_{name}", help, ("model",), buckets=buckets, registry=self.registry)


class _AtReading(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        return ()


def replica_metrics(replicas: list[Replica]) -> Iterable[Metric]:
    """What the living replicas say of themselves in their heartbeats."""
    labels = ("model", "node", "replica")
    gauges = {
        "running": "Sequences that run",
        "waiting": "Sequences that wait at the replica",
        "blocks_free": "KV blocks that are free",
        "blocks_total": "KV blocks in all",
    }
    for field, help in gauges.items():
        family = GaugeMetricFamily(f"springtide_replica_{field}", help, labels=labels)
        for replica in replicas:
            family.add_metric((replica.model, replica.node, replica.id), getattr(replica.load, field))
        yield family
    ready = GaugeMetricFamily("springtide_replica_ready", "Whether the replica takes requests", labels=labels)
    preemptions = CounterMetricFamily(
        "springtide_replica_preemptions", "Sequences set back for want of blocks", labels=labels
    )
    for replica in replicas:
        key = (replica.model, replica.node, replica.id)
        ready.add_metric(key, replica.state == "ready")
        preemptions.add_metric(key, replica.load.preemptions)
    yield ready
    yield preemptions


def gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"springtide_{name}", help, value=value)


def gauges(name: str, help: str, values: Mapping[str, float], label: str = "model") -> Metric:
    """One gauge with a value for each value of a label."""
    family = GaugeMetricFamily(f"springtide_{name}", help, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def counters(name: str, help: str, values: Mapping[str, float], label: str = "event") -> Metric:
    """One counter with a value for each value of a label."""
    family = CounterMetricFamily(f"springtide_{name}", help, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(f"springtide_{name}", help, value=value)
