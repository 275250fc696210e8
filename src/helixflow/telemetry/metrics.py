"""Metric instruments of the data plane. Labels are bounded: deployments come from the configuration only."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_DURATION_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestSeries:
    """The instruments of one (operation, deployment, status): looked up once, used for every such request."""

    __slots__ = ("duration", "first_token", "inter_token", "requests", "tokens_in", "tokens_out")

    def __init__(self, metrics: "GatewayMetrics", operation: str, deployment: str, status: str) -> None:
        self.requests = metrics.requests.labels(operation, deployment, status)
        self.duration = metrics.duration.labels(operation, deployment)
        self.first_token = metrics.first_token.labels(operation, deployment)
        self.inter_token = metrics.inter_token.labels(deployment)
        self.tokens_in = metrics.tokens.labels(deployment, "in")
        self.tokens_out = metrics.tokens.labels(deployment, "out")


class GatewayMetrics:
    """All instruments of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "helixflow_requests", "Requests answered.", ("operation", "deployment", "status"), registry=self.registry
        )
        self.duration = Histogram(
            "helixflow_request_seconds",
            "From the request's head to the end of its answer.",
            ("operation", "deployment"),
            buckets=_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "helixflow_first_token_seconds",
            "From the request's head to the first content.",
            ("operation", "deployment"),
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "helixflow_inter_token_seconds",
            "Mean time between tokens of an answer.",
            ("deployment",),
            buckets=_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.tokens = Counter("helixflow_tokens", "Tokens.", ("deployment", "direction"), registry=self.registry)
        self.in_flight = Gauge("helixflow_requests_in_flight", "Requests under way.", registry=self.registry)
        self._series: dict[tuple[str, str, int], RequestSeries] = {}

    def series(self, operation: str, deployment: str, status: int) -> RequestSeries:
        key = (operation, deployment, status)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = RequestSeries(self, operation, deployment, str(status))
        return series


class DeploymentCollector(Collector):
    """Figures read when asked for: queue, slots, replicas, restarts, by deployment.

    `read` gives rows of (deployment, queued, in_flight, replicas, restarts).
    """

    def __init__(self, read: Callable[[], Iterable[tuple[str, int, int, int, int]]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        queued = GaugeMetricFamily("helixflow_queue_requests", "Requests waiting for a slot.", labels=["deployment"])
        busy = GaugeMetricFamily("helixflow_slots_busy", "Slots in use.", labels=["deployment"])
        replicas = GaugeMetricFamily("helixflow_replicas", "Replicas that serve.", labels=["deployment"])
        restarts = CounterMetricFamily(
            "helixflow_engine_restarts", "Engine processes started again after a crash.", labels=["deployment"]
        )
        for deployment, waiting, in_flight, serving, restarted in self._read():
            queued.add_metric([deployment], waiting)
            busy.add_metric([deployment], in_flight)
            replicas.add_metric([deployment], serving)
            restarts.add_metric([deployment], restarted)
        return [queued, busy, replicas, restarts]
