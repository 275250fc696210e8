"""Metric instruments of the data plane. Labels are bounded: deployments come from the configuration only.

Counting is on the hot path, so the figures are plain numbers of one thread that become Prometheus' families only when
they are asked for: measured 1.5 µs a request, where prometheus-client's instruments take 8.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

FIRST_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
DURATION_BUCKETS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Distribution:
    """A histogram's figures."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        names = [*map(str, self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum)


class RequestSeries:
    """The figures of one (operation, deployment, status, error)."""

    __slots__ = ("duration", "first_token", "inter_token", "requests", "resumed", "tokens_in", "tokens_out")

    def __init__(self) -> None:
        self.requests = 0
        self.resumed = 0
        self.tokens_in = 0
        self.tokens_out = 0
        self.duration = Distribution(DURATION_BUCKETS)
        self.first_token = Distribution(FIRST_TOKEN_BUCKETS)
        self.inter_token = Distribution(TOKEN_BUCKETS)


class GatewayMetrics(Collector):
    """All figures of one gateway, in a registry of its own; `in_flight` and `lost_log_writes` are asked for theirs."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.in_flight: Callable[[], int] = int
        self.lost_log_writes: Callable[[], int] = int
        self._series: dict[tuple[str, str, int, str], RequestSeries] = {}

    def series(self, operation: str, deployment: str, status: int, error: str) -> RequestSeries:
        """`error` is "" or the value of an `ErrorKind`: a stream may fail after its status has gone out."""
        key = (operation, deployment, status, error)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = RequestSeries()
        return series

    def collect(self) -> Iterable[Metric]:
        labels = ["operation", "deployment", "status", "error"]
        requests = CounterMetricFamily("helixflow_requests", "Requests answered.", labels=labels)
        duration = HistogramMetricFamily(
            "helixflow_request_seconds", "From the request's head to the end of its answer.", labels=labels
        )
        first_token = HistogramMetricFamily(
            "helixflow_first_token_seconds", "From the request's head to the first content.", labels=labels
        )
        inter_token = HistogramMetricFamily(
            "helixflow_inter_token_seconds", "Mean time between the tokens of an answer.", labels=labels
        )
        tokens = CounterMetricFamily("helixflow_tokens", "Tokens.", labels=[*labels, "direction"])
        resumed = CounterMetricFamily(
            "helixflow_answers_resumed", "Replicas that were lost under an answer and replaced.", labels=labels
        )
        for (operation, deployment, status, error), series in self._series.items():
            values = [operation, deployment, str(status), error]
            requests.add_metric(values, series.requests)
            series.duration.add_to(duration, values)
            series.first_token.add_to(first_token, values)
            series.inter_token.add_to(inter_token, values)
            tokens.add_metric([*values, "in"], series.tokens_in)
            tokens.add_metric([*values, "out"], series.tokens_out)
            if series.resumed:
                resumed.add_metric(values, series.resumed)
        in_flight = GaugeMetricFamily("helixflow_requests_in_flight", "Requests under way.", value=self.in_flight())
        lost = CounterMetricFamily(
            "helixflow_log_writes_lost", "Writes of request lines that failed.", value=self.lost_log_writes()
        )
        return [requests, duration, first_token, inter_token, tokens, resumed, in_flight, lost]


class QueueFigures:
    """Of the requests for one deployment that found no free slot: how long they waited, and those that were refused."""

    __slots__ = ("refused", "waits")

    def __init__(self) -> None:
        self.waits = Distribution(DURATION_BUCKETS)
        self.refused = 0


class DeploymentRow(NamedTuple):
    """A deployment now. `first_place` is that of the first waiting request in the queue over all gateways, from 1."""

    deployment: str
    queued: int
    first_place: int
    in_flight: int
    replicas: int
    restarts: int
    figures: QueueFigures


class DeploymentCollector(Collector):
    """Figures read when asked for: queue, slots, replicas, restarts, by deployment."""

    def __init__(self, read: Callable[[], Iterable[DeploymentRow]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        queued = GaugeMetricFamily("helixflow_queue_requests", "Requests waiting for a slot.", labels=["deployment"])
        place = GaugeMetricFamily(
            "helixflow_queue_first_place",
            "Place of this gateway's first waiting request in the queue of all gateways; 0 without one.",
            labels=["deployment"],
        )
        waits = HistogramMetricFamily(
            "helixflow_queue_wait_seconds", "How long requests waited that found no free slot.", labels=["deployment"]
        )
        refused = CounterMetricFamily(
            "helixflow_queue_refusals",
            "Requests refused because the queue was full or the wait too long.",
            labels=["deployment"],
        )
        busy = GaugeMetricFamily("helixflow_slots_busy", "Slots in use.", labels=["deployment"])
        replicas = GaugeMetricFamily("helixflow_replicas", "Replicas that serve.", labels=["deployment"])
        restarts = CounterMetricFamily(
            "helixflow_engine_restarts", "Engine processes started again after a crash.", labels=["deployment"]
        )
        for row in self._read():
            labels = [row.deployment]
            queued.add_metric(labels, row.queued)
            place.add_metric(labels, row.first_place)
            row.figures.waits.add_to(waits, labels)
            refused.add_metric(labels, row.figures.refused)
            busy.add_metric(labels, row.in_flight)
            replicas.add_metric(labels, row.replicas)
            restarts.add_metric(labels, row.restarts)
        return [queued, place, waits, refused, busy, replicas, restarts]
