"""Questions to deployments that nobody uses, or that have been ejected: whether they are there at all."""

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Final, Protocol, runtime_checkable

import structlog

from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.routing.target import Target

_LOOK_S: Final = 0.5
# One that has failed is repeated soon: a deployment is ejected for several in a row.
_REPEAT_S: Final = 2.0
_TIMEOUT_S: Final = 5.0
_AT_ONCE: Final = 8
# Part of an interval that is taken off at random: gateways do not ask in step.
_JITTER: Final = 0.2

log = structlog.get_logger("helixflow.routing")


@runtime_checkable
class Probed(Protocol):
    """An engine that can be asked whether its server is there."""

    async def probe(self, deadline: float) -> None:
        """Asks what costs nothing, never for a generation. Raises `HelixError` when it does not serve.

        `deadline` is on the event loop's clock, seconds.
        """
        ...


class ProbeSchedule:
    """Which targets are to be probed when. Decides only; moments are on `clock.monotonic`'s clock."""

    def __init__(self, clock: Clock, *, random_unit: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._random_unit = random_unit
        self._watched: dict[str, _Watched] = {}

    def due(self, targets: Iterable[Target]) -> list[Target]:
        """Those that are to be probed now; each counts as under way until it is `done`.

        `targets` are all that there are: others are forgotten.
        """
        now = self._clock.monotonic()
        watched: dict[str, _Watched] = {}
        due: list[Target] = []
        for target in targets:
            if not target.settings.probe_interval_s or not isinstance(target.engine, Probed):
                continue
            one = self._watched.get(target.deployment)
            if one is None or one.target is not target:
                one = _Watched(target, now + self._interval_s(target))
            watched[target.deployment] = one
            if one.is_under_way:
                continue
            if not target.health.is_ejected and (target.in_flight or target.health.begun != one.begun):
                # Its calls say more than a probe would.
                one.begun = target.health.begun
                one.due_at = now + self._interval_s(target)
            elif now >= one.due_at:
                one.is_under_way = True
                due.append(target)
        self._watched = watched
        return due

    def done(self, target: Target, *, well: bool) -> bool:
        """The probe has answered, or not. Whether that is news."""
        target.health.probed(well=well)
        one = self._watched.get(target.deployment)
        if one is None or one.target is not target:
            return False
        interval_s = self._interval_s(target)
        one.due_at = self._clock.monotonic() + (interval_s if well else min(interval_s, _REPEAT_S))
        one.is_under_way = False
        changed = one.is_well is not well
        one.is_well = well
        return changed

    def _interval_s(self, target: Target) -> float:
        return target.settings.probe_interval_s * (1 - _JITTER * self._random_unit())


class _Watched:
    __slots__ = ("begun", "due_at", "is_under_way", "is_well", "target")

    def __init__(self, target: Target, due_at: float) -> None:
        self.target = target
        self.due_at = due_at
        self.begun = target.health.begun
        self.is_under_way = False
        self.is_well = True


class Probes:
    """Probes the targets that need it; `run` it while the gateway serves."""

    def __init__(self, targets: Callable[[], Iterable[Target]], clock: Clock) -> None:
        """`targets` gives those of the moment."""
        self._targets = targets
        self._schedule = ProbeSchedule(clock)
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Until cancelled, which ends the probes under way."""
        async with asyncio.TaskGroup() as probes:
            while True:
                for target in self._schedule.due(self._targets()):
                    probes.create_task(self._probe(target))
                await asyncio.sleep(_LOOK_S)

    async def _probe(self, target: Target) -> None:
        engine = target.engine
        assert isinstance(engine, Probed)
        reason = ""
        async with self._places:
            deadline = asyncio.get_running_loop().time() + _TIMEOUT_S
            try:
                async with asyncio.timeout_at(deadline):
                    await engine.probe(deadline)
            except HelixError as exc:
                # Who limits requests is there.
                if exc.kind is not ErrorKind.RATE_LIMITED:
                    reason = exc.code
            except TimeoutError:
                reason = "timeout"
            except Exception:
                # A fault of ours: this deployment is not probed well, and all others go on.
                reason = "internal_error"
                log.exception("deployment.probe_raised", deployment=target.deployment)
        if self._schedule.done(target, well=not reason):
            if reason:
                log.warning("deployment.probe_failed", deployment=target.deployment, reason=reason)
            else:
                log.info("deployment.probe_restored", deployment=target.deployment)
