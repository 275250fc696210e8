"""Targets that do far worse than the rest of their tier, without failing often enough in a row to be ejected for it."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Final

import structlog

from helixflow.routing.health import Health
from helixflow.settings.serving import RoutingSettings

REVIEW_S: Final = 1.0
# Less than that says nothing.
_MIN_CALLS: Final = 20
# Far worse: of its calls this part fails beyond three times the part of the others'.
_FAILURE_MARGIN: Final = 0.2
_FAILURE_FACTOR: Final = 3
# Far slower: four times the others' median, and by so many seconds.
_LATENCY_FACTOR: Final = 4
_LATENCY_MARGIN_S: Final = 0.5

log = structlog.get_logger("helixflow.routing")


class Outliers:
    """Ejects outliers of a tier, the worst first, by what its targets' `Health` has counted lately.

    Never more than `max_ejected_percent` of the tier are ejected by it, those counted that are ejected already, and
    never the last one that serves.
    """

    def __init__(self, routing: RoutingSettings) -> None:
        self._max_percent = routing.max_ejected_percent
        self._kept = 0.5 ** (REVIEW_S / routing.latency_half_life_s)

    def review(self, tier: Sequence[Health]) -> list[Health]:
        """Those that it has ejected."""
        serving = [health for health in tier if not health.is_ejected]
        room = min(len(tier) * self._max_percent // 100 - (len(tier) - len(serving)), len(serving) - 1)
        ejected: list[Health] = []
        while len(ejected) < room and (worst := _worst(serving)) is not None:
            serving.remove(worst)
            ejected.append(worst)
            worst.eject()
        return ejected

    async def run(self, tiers: Callable[[], Iterable[Sequence[tuple[str, Health]]]]) -> None:
        """Reviews all tiers now and then, until cancelled. `tiers` gives those of the moment: deployments by name."""
        while True:
            await asyncio.sleep(REVIEW_S)
            seen: dict[str, Health] = {}
            for tier in tiers():
                seen.update(tier)
                if len(tier) < 2:
                    continue
                for health in self.review([health for _, health in tier]):
                    name = next(name for name, one in tier if one is health)
                    log.warning("deployment.outlier", deployment=name, retry_after_s=round(health.retry_after_s, 3))
            for health in seen.values():
                health.age(self._kept)


def _worst(serving: Sequence[Health]) -> Health | None:
    """The one that is furthest beyond the others, if any is far beyond."""
    measured = [health for health in serving if health.succeeded + health.failed >= _MIN_CALLS]
    if len(measured) < 2:
        return None
    found: tuple[float, Health] | None = None
    for health in measured:
        others = [other for other in measured if other is not health]
        excess = max(_failure_excess(health, others), _latency_excess(health, others))
        if excess > 1 and (found is None or excess > found[0]):
            found = excess, health
    return None if found is None else found[1]


def _failure_excess(health: Health, others: Sequence[Health]) -> float:
    """How many times what is allowed it fails."""
    failed = sum(other.failed for other in others)
    usual = failed / (failed + sum(other.succeeded for other in others))
    return health.failed / (health.failed + health.succeeded) / (_FAILURE_MARGIN + _FAILURE_FACTOR * usual)


def _latency_excess(health: Health, others: Sequence[Health]) -> float:
    """How many times as long as is allowed it takes."""
    usual = [other.latency_sum_s / other.succeeded for other in others if other.succeeded]
    if not usual or not health.succeeded:
        return 0.0
    allowed = max(_LATENCY_FACTOR * median(usual), median(usual) + _LATENCY_MARGIN_S)
    return health.latency_sum_s / health.succeeded / allowed
