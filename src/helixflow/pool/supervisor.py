"""Keeps the engines of all deployments of this node alive, and lets watchers follow."""

import asyncio
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import structlog

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.engines.launching import EngineKind
from helixflow.pool.activity import Activity, NoActivity
from helixflow.pool.broadcast import Broadcast
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.deployment import LocalDeployment
from helixflow.pool.launcher_client import Engines, RunningEngine
from helixflow.pool.lifecycle import DeploymentView, State, combine
from helixflow.pool.measured import NoFigures
from helixflow.pool.memory import Limits
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.pulls import Pull, Pulls
from helixflow.pool.replica import HealthPolicy
from helixflow.pool.residency import Residency
from helixflow.pool.seat import Figures, Means
from helixflow.process.backoff import Backoff

_STOP_GRACE_S: Final = 3.0
_DRAIN_LOOK_S: Final = 0.05
_SCALED_TO_ZERO: Final = "scaled to 0 replicas; scale it up to serve it again"
log = structlog.get_logger("helixflow.pool")


class Supervisor:
    """`run` works until cancelled and leaves running engines to its successor, which finds them at the launcher.

    `kinds` are those of engines, by their names in the settings; making it raises as `apply`. Without `residency` and
    `figures` everything fits. Methods that take a deployment's name raise `HelixError` (NOT_FOUND) for an unknown one.
    """

    def __init__(
        self,
        planned: Sequence[PlannedDeployment],
        engines: Engines,
        kinds: Mapping[str, EngineKind],
        pull: Pull,
        *,
        residency: Residency | None = None,
        figures: Figures | None = None,
        activity: Activity | None = None,
        policy: HealthPolicy | None = None,
        clock: Clock | None = None,
        make_backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self.changes = Broadcast()
        self.is_draining = False
        # Replicas that an earlier process started.
        self.adopted: set[str] = set()
        self.pulls = Pulls(pull)
        self._engines = engines
        self._kinds = kinds
        self._clock = clock if clock is not None else SystemClock()
        self._policy = policy if policy is not None else HealthPolicy()
        self._activity = activity if activity is not None else NoActivity()
        if residency is None:
            residency = Residency(lambda _given: Limits(sys.maxsize), self._activity, self._clock)
        self._means = Means(
            self.pulls,
            residency,
            figures if figures is not None else NoFigures(),
            self._clock,
            self._policy.load_timeout_s,
        )
        self._make_backoff = make_backoff
        self._generations = itertools.count(1)
        self._current: dict[str, LocalDeployment] = {}
        # Those that were replaced or are no longer configured, until they have ended.
        self._retiring: list[LocalDeployment] = []
        self._group: asyncio.TaskGroup | None = None
        for one in planned:
            self._current[one.name] = self._make(one)

    def snapshot(self) -> tuple[DeploymentView, ...]:
        """All deployments as they are now, in the order of the settings; then those that are on their way out."""
        retiring = [one for one in self._retiring if one.deployment not in self._current]
        return tuple(self._view(one) for one in (*self._current.values(), *retiring) if one.seat_views)

    def spec_of(self, deployment: str) -> ModelSpec | None:
        """The model of a deployment; None where the engine brings its own."""
        return self._find(deployment).planned.spec

    def load(self, deployment: str) -> None:
        """Asks for a deployment that is idle or has failed.

        Raises `HelixError`: SHUTTING_DOWN while the pool is drained, UNAVAILABLE when it is scaled to 0 replicas.
        """
        one = self._find(deployment)
        if self.is_draining:
            raise HelixError(ErrorKind.SHUTTING_DOWN, "This pool is being drained: it loads no models.")
        if one.replicas == 0:
            raise HelixError(ErrorKind.UNAVAILABLE, f"The deployment {deployment!r} is {_SCALED_TO_ZERO}.")
        one.load(may_evict=True)

    async def load_and_wait(self, deployment: str) -> None:
        """Returns once a replica serves. Raises as `load`, OVERLOADED with the numbers when it does not fit, and
        UPSTREAM_UNAVAILABLE when it cannot be loaded.
        """
        self.load(deployment)
        while not (one := self._find(deployment)).is_serving:
            seen = self.changes.revision
            views = one.seat_views
            if all(view.state in (State.FAILED, State.IDLE) for view in views) and not one.is_leaving:
                detail = next((view.detail for view in views if view.detail), "it was unloaded")
                full = any(view.lacks_memory for view in views)
                kind = ErrorKind.OVERLOADED if full else ErrorKind.UPSTREAM_UNAVAILABLE
                raise HelixError(kind, f"The deployment {deployment!r} was not loaded: {detail}.")
            await self.changes.wait_beyond(seen)

    async def unload(self, deployment: str, grace_s: float) -> None:
        """Returns once its engines have ended: when what they do has, at the latest after `grace_s`."""
        one = self._find(deployment)
        one.unload(grace_s)
        while one.is_leaving:
            await self.changes.wait_beyond(self.changes.revision)

    def pin(self, deployment: str, pinned: bool) -> None:
        """Whether it may be unloaded to make room for another one."""
        self._find(deployment).is_pinned = pinned
        self._means.residency.wake()
        self.changes.bump()

    def scale(self, deployment: str, replicas: int) -> None:
        """How many replicas it is to have. 0 unloads it and keeps it from being loaded."""
        self._find(deployment).scale(replicas)

    async def drain(self, deadline_s: float) -> int:
        """No loads and no new generations from now on. Returns the generations that still run when the deadline
        passes, 0 as soon as there are none.
        """
        self.is_draining = True
        for one in self._current.values():
            one.end_asleep()
        self.changes.bump()
        deadline = self._clock.monotonic() + deadline_s
        running = await self._count_running()
        while running and self._clock.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_LOOK_S)  # engines do not tell when they have ended
            running = await self._count_running()
        return running

    def resume(self) -> None:
        """Undoes `drain`."""
        self.is_draining = False
        self.changes.bump()

    def apply(self, planned: Sequence[PlannedDeployment]) -> None:
        """Takes new settings over. What is unchanged, or changed in nothing that engines depend on, goes on as it is.

        What is gone ends once its generations have. What has changed is loaded beside the old one, which serves until
        the new one does, if memory allows; a new one that cannot be loaded leaves the old one serving. Raises
        `UserError` (CONFIG) for an engine that this node has not; nothing has changed then.
        """
        for one in planned:
            self._kind_of(one)
        before, self._current = self._current, {}
        for one in planned:
            known = before.pop(one.name, None)
            if known is None:
                self._current[one.name] = self._add(one)
            elif known.planned.fingerprint == one.fingerprint:
                was_first_use = known.planned.settings.load == "first_use"
                known.change(one)
                self._current[one.name] = known
                if was_first_use and one.settings.load == "start":
                    known.load(may_evict=False)
            else:
                self._current[one.name] = self._replace(known, one)
        for gone in before.values():
            self._retire(gone)
        self._means.residency.wake()
        self.changes.bump()

    async def run(self) -> None:
        """Raises `HelixError` (UNAVAILABLE) when the launcher cannot be asked. Without engines it only waits.

        Call it once. Pulls that go on when it is cancelled end at their next report of progress.
        """
        try:
            for engine in await self._engines.list():
                await self._take_over(engine)
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._means.residency.run(), name="residency")
                for one in self._current.values():
                    group.create_task(self._keep(one), name=f"deployment:{one.key}")
                for retired in self._retiring:
                    group.create_task(self._keep(retired), name=f"deployment:{retired.key}")
                    if retired.is_superseded:
                        group.create_task(self._hand_over(retired), name=f"handover:{retired.key}")
        finally:
            self.pulls.close()

    def _make(self, planned: PlannedDeployment) -> LocalDeployment:
        one = LocalDeployment(
            f"{planned.name}#{next(self._generations)}",
            planned,
            self._engines,
            self._kind_of(planned),
            self._means,
            self._policy,
            self._make_backoff,
            self.changes.bump,
        )
        if planned.settings.load == "start" and one.replicas:
            one.load(may_evict=False)
        return one

    def _kind_of(self, planned: PlannedDeployment) -> EngineKind:
        kind = self._kinds.get(planned.settings.engine)
        if kind is None:
            raise UserError(f"{planned.name}: this node has no engine {planned.settings.engine!r}", ExitCode.CONFIG)
        return kind

    def _add(self, planned: PlannedDeployment) -> LocalDeployment:
        one = self._make(planned)
        self._start(one)
        return one

    def _start(self, one: LocalDeployment) -> None:
        if self._group is not None:
            self._group.create_task(self._keep(one), name=f"deployment:{one.key}")

    async def _keep(self, one: LocalDeployment) -> None:
        await one.run()
        if one in self._retiring:
            self._retiring.remove(one)
            self.changes.bump()

    def _replace(self, old: LocalDeployment, planned: PlannedDeployment) -> LocalDeployment:
        new = self._add(planned)
        if old.is_loaded:
            old.is_superseded = True
            self._retiring.append(old)
            if self._group is not None:
                self._group.create_task(self._hand_over(old), name=f"handover:{old.key}")
        else:
            self._retire(old)
        # The one before may have failed, and the one before that still serve.
        if new.replicas and any(one.is_superseded and one.deployment == new.deployment for one in self._retiring):
            new.load(may_evict=True)
        return new

    async def _hand_over(self, old: LocalDeployment) -> None:
        """Ends the old one once what has taken its place serves, or is itself no longer wanted."""
        while (new := self._current.get(old.deployment)) is not None and not new.is_serving:
            if not new.replicas or not old.is_loaded:
                break
            await self.changes.wait_beyond(self.changes.revision)
        old.dismiss(self._policy.end_grace_s)

    def _retire(self, one: LocalDeployment) -> None:
        if one not in self._retiring:
            self._retiring.append(one)
        one.dismiss(self._policy.end_grace_s)

    def _find(self, deployment: str) -> LocalDeployment:
        one = self._current.get(deployment)
        if one is None:
            raise HelixError(ErrorKind.NOT_FOUND, f"There is no deployment {deployment!r} on this node.")
        return one

    def _view(self, one: LocalDeployment) -> DeploymentView:
        others = [other for other in self._retiring if other.deployment == one.deployment and other is not one]
        parts = [one, *others] if one.deployment in self._current else [one]
        seats = [view for part in parts for view in part.seat_views]
        used_at = self._activity.last_used(one.deployment)
        now = self._clock.monotonic()
        view = combine(
            one.deployment,
            seats,
            restarts=sum(part.all_restarts for part in parts),
            now=now,
            out_of_service=_SCALED_TO_ZERO if one.replicas == 0 else "",
        )
        return replace(
            view,
            pinned=one.is_pinned,
            wanted_replicas=one.replicas,
            need=one.need,
            last_used_at=self._clock.now() - (now - used_at) if used_at else 0.0,
            busy=self._activity.busy_slots(one.deployment),
        )

    async def _count_running(self) -> int:
        everything = (*self._current.values(), *self._retiring)
        running = sum(await asyncio.gather(*(one.count_running() for one in everything)))
        return max(running, sum(self._activity.busy(name) for name in self._current))

    async def _take_over(self, engine: RunningEngine) -> None:
        """Gives a running engine the seat it was started for, or ends it when no such seat is wanted any more."""
        meta = engine.meta
        one = self._current.get(str(meta.get("deployment")))
        index = meta.get("seat")
        matches = one is not None and one.planned.fingerprint == meta.get("fingerprint") and isinstance(index, int)
        if one is not None and matches and one.adopt(int(index or 0), engine):
            self.adopted.add(engine.name)
            log.info("replica.adopted", replica=engine.name, pid=engine.pid)
        else:
            log.info("replica.unwanted", replica=engine.name, pid=engine.pid)
            await self._engines.stop(engine.name, _STOP_GRACE_S)
