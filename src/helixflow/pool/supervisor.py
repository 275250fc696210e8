"""Keeps the engines of all deployments of this node alive, and lets watchers follow."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.launching import EngineKind
from helixflow.pool.broadcast import Broadcast
from helixflow.pool.launcher_client import Engines, RunningEngine
from helixflow.pool.lifecycle import CrashHistory, DeploymentView, combine
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.replica import HealthPolicy, ReplicaLives
from helixflow.pool.seat import Pull, Seat
from helixflow.process.backoff import Backoff

_STOP_GRACE_S = 3.0
log = structlog.get_logger("helixflow.pool")


class Supervisor:
    """`run` works until cancelled and leaves running engines to its successor, which finds them at the launcher.

    `kinds` are those of engines, by their names in the settings.
    """

    def __init__(
        self,
        planned: Sequence[PlannedDeployment],
        engines: Engines,
        kinds: Mapping[str, EngineKind],
        pull: Pull,
        *,
        policy: HealthPolicy | None = None,
        clock: Clock | None = None,
        make_backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._planned = planned
        self._engines = engines
        self._clock = clock if clock is not None else SystemClock()
        self.changes = Broadcast()
        # A thread a seat, made when it pulls: those that wait for the store must not use up the default executor.
        seats = sum(one.settings.replicas for one in planned)
        self._threads = ThreadPoolExecutor(max(1, seats), thread_name_prefix="pull")
        self._seats: dict[str, list[Seat]] = {}
        for one in planned:
            lives = ReplicaLives(one, engines, kinds[one.settings.engine], policy or HealthPolicy(), self._clock)
            self._seats[one.name] = [
                Seat(
                    index,
                    one,
                    lives,
                    CrashHistory(make_backoff()),
                    pull,
                    self._threads,
                    self._clock,
                    self.changes.bump,
                )
                for index in range(one.settings.replicas)
            ]

    def snapshot(self) -> tuple[DeploymentView, ...]:
        """All deployments as they are now, in the order of the settings."""
        now = self._clock.monotonic()
        return tuple(
            combine(name, [seat.view for seat in seats], restarts=sum(seat.restarts for seat in seats), now=now)
            for name, seats in self._seats.items()
        )

    def load(self, deployment: str) -> None:
        """Asks for a deployment that is idle or has failed. Raises `HelixError` (NOT_FOUND) for an unknown one."""
        seats = self._seats.get(deployment)
        if seats is None:
            raise HelixError(ErrorKind.NOT_FOUND, f"There is no deployment {deployment!r} on this node.")
        for seat in seats:
            seat.want()

    async def run(self) -> None:
        """Raises `HelixError` (UNAVAILABLE) when the launcher cannot be asked. Without engines it only waits.

        Call it once. Pulls that go on when it is cancelled end at their next report of progress.
        """
        try:
            await self._keep_all()
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _keep_all(self) -> None:
        for engine in await self._engines.list():
            await self._take_over(engine)
        if not self._seats:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            for one in self._planned:
                for index, seat in enumerate(self._seats[one.name]):
                    group.create_task(seat.keep(), name=f"seat:{one.name}#{index}")
                if one.settings.load == "start":
                    self.load(one.name)

    async def _take_over(self, engine: RunningEngine) -> None:
        """Gives a running engine the seat it was started for, or ends it when no such seat is wanted any more."""
        meta = engine.meta
        planned = next((one for one in self._planned if one.name == meta.get("deployment")), None)
        seats = self._seats[planned.name] if planned is not None else []
        index = meta.get("seat")
        if (
            planned is not None
            and planned.fingerprint == meta.get("fingerprint")
            and isinstance(index, int)
            and 0 <= index < len(seats)
            and seats[index].is_vacant
        ):
            log.info("replica.adopted", replica=engine.name, pid=engine.pid)
            seats[index].adopt(engine)
        else:
            log.info("replica.unwanted", replica=engine.name, pid=engine.pid)
            await self._engines.stop(engine.name, _STOP_GRACE_S)
