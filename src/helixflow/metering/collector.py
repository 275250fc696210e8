"""Figures of metering for Prometheus, read when they are asked for."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from helixflow.metering.admission import Limiter
from helixflow.metering.journal.writer import JournalWriter
from helixflow.metering.meter import Metered

# By name: whether it only grows, and what it is.
_SHIPPER: Final[Mapping[str, tuple[bool, str]]] = {
    "backlog_records": (False, "Records in the journals of this node that are not in the ledger yet."),
    "backlog_bytes": (False, "Size of those records."),
    "journals": (False, "Journals on this node."),
    "oldest_unshipped_s": (False, "Age of the oldest of those records, seconds."),
    "shipped_rows": (True, "Finished requests that the ledger has taken."),
    "quarantined": (True, "Stretches of journals that could not be read and were set aside."),
}

log = structlog.get_logger("helixflow.metering")


class MeteringCollector(Collector):
    """`shipper_file` is where the node's shipper leaves its figures; there are none while it has not."""

    def __init__(self, metered: Metered, journal: JournalWriter, limiter: Limiter, shipper_file: Path) -> None:
        self._metered = metered
        self._journal = journal
        self._limiter = limiter
        self._shipper_file = shipper_file

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
        for name, value in self._journal.figures().items():
            yield CounterMetricFamily(f"helixflow_journal_{name}", f"Journal: {name.replace('_', ' ')}.", value=value)
        for name, value in self._limiter.figures().items():
            yield GaugeMetricFamily(f"helixflow_limiter_{name}", f"Limiter: {name.replace('_', ' ')}.", value=value)
        yield from self._shipper()

    def _shipper(self) -> Iterable[Metric]:
        try:
            figures = json.loads(self._shipper_file.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as exc:
            log.warning("shipper.figures_unreadable", reason=str(exc))
            return
        for name, (grows, text) in _SHIPPER.items():
            family = CounterMetricFamily if grows else GaugeMetricFamily
            yield family(f"helixflow_shipper_{name}", text, value=figures.get(name, 0))
