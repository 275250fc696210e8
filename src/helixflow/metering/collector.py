"""Figures of metering for Prometheus, read when they are asked for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from msgspec.structs import asdict
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from helixflow.metering.admission import Limiter
from helixflow.metering.journal.writer import JournalWriter
from helixflow.metering.meter import Metered
from helixflow.metering.shipping.figures import read_status

# By name: whether it only grows, and what it is.
_SHIPPER: Final[Mapping[str, tuple[bool, str]]] = {
    "backlog_records": (False, "Records in the journals of this node that are not in the ledger yet."),
    "backlog_bytes": (False, "Size of those records."),
    "journals": (False, "Journals on this node."),
    "oldest_unshipped_s": (False, "Age of the oldest of those records, seconds."),
    "shipped_rows": (True, "Finished requests that the ledger has taken."),
    "interrupted": (True, "Requests whose gateway ended before they did."),
    "quarantined": (True, "Stretches of journals that could not be read and were set aside."),
    "orphaned": (True, "Settlements whose admission could not be read."),
}


class MeteringCollector(Collector):
    """The node's shipper leaves its figures in `run_dir`; there are none while it has not."""

    def __init__(self, metered: Metered, journal: JournalWriter, limiter: Limiter, run_dir: Path) -> None:
        self._metered = metered
        self._journal = journal
        self._limiter = limiter
        self._run_dir = run_dir

    def collect(self) -> Iterable[Metric]:
        refused = CounterMetricFamily(
            "helixflow_refused_requests", "Requests refused by a limit or budget.", labels=["by"]
        )
        for name, count in self._metered.refused.items():
            refused.add_metric([name], count)
        yield refused
        yield GaugeMetricFamily(
            "helixflow_metered_requests", "Requests admitted and not settled.", value=self._metered.in_flight
        )
        for room, figures in (("journal", self._journal.figures), ("limiter", self._limiter.figures)):
            for name, value in asdict(figures).items():
                text = f"{room.capitalize()}: {name.replace('_', ' ')}."
                yield GaugeMetricFamily(f"helixflow_{room}_{name}", text, value=value)
        yield from self._shipper()

    def _shipper(self) -> Iterable[Metric]:
        status = read_status(self._run_dir)
        if status is None:
            return
        for name, (grows, text) in _SHIPPER.items():
            family = CounterMetricFamily if grows else GaugeMetricFamily
            yield family(f"helixflow_shipper_{name}", text, value=getattr(status, name))
