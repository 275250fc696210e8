"""One deployment on this node: its seats, and what was asked for it at run time (pinned, replicas)."""

import asyncio
from collections.abc import Callable

from helixflow.engines.launching import EngineKind
from helixflow.pool.launcher_client import Engines, RunningEngine
from helixflow.pool.lifecycle import CrashHistory, SeatView, State
from helixflow.pool.memory import Need
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.replica import HealthPolicy, ReplicaLives
from helixflow.pool.seat import Means, Seat
from helixflow.process.backoff import Backoff


class LocalDeployment:
    """Implements `Tenant`. `run` works until cancelled, or until it was dismissed and all its seats are empty.

    `is_pinned` and `replicas` begin as the settings say and hold until they are changed or the settings are.
    `is_superseded` is set from outside once another one is to take its place.
    """

    def __init__(
        self,
        key: str,
        planned: PlannedDeployment,
        engines: Engines,
        kind: EngineKind,
        means: Means,
        policy: HealthPolicy,
        make_backoff: Callable[[], Backoff],
        on_change: Callable[[], None],
    ) -> None:
        self.key = key
        self.planned = planned
        self.is_pinned = planned.settings.pinned
        self.replicas = planned.settings.replicas
        self.is_superseded = False
        self.restarts = 0
        self._means = means
        self._on_change = on_change
        self._make_backoff = make_backoff
        self._lives = ReplicaLives(planned, engines, kind, policy, means.clock)
        self._grace_s = policy.end_grace_s
        self._may_evict = False
        self._seats: list[Seat] = []
        self._group: asyncio.TaskGroup | None = None
        self._dismissed = asyncio.Event()
        self._fill_seats()

    @property
    def deployment(self) -> str:
        return self.planned.name

    @property
    def keep_alive_s(self) -> float:
        return self.planned.settings.keep_alive_s

    @property
    def is_leaving(self) -> bool:
        return any(seat.is_leaving for seat in self._seats)

    @property
    def is_asleep(self) -> bool:
        return any(seat.is_asleep for seat in self._seats) and all(
            seat.is_asleep or seat.is_vacant for seat in self._seats
        )

    @property
    def seat_views(self) -> list[SeatView]:
        return [seat.view for seat in self._seats]

    @property
    def all_restarts(self) -> int:
        """Of all its seats, those that are gone included."""
        return self.restarts + sum(seat.restarts for seat in self._seats)

    @property
    def need(self) -> Need | None:
        """What one replica takes; None before one was loaded."""
        needs = [seat.need for seat in self._seats if seat.need is not None]
        return max(needs, key=lambda need: need.ram_bytes, default=None)

    @property
    def is_serving(self) -> bool:
        return any(view.state is State.READY for view in self.seat_views)

    @property
    def is_loaded(self) -> bool:
        """Whether something of it takes memory or is about to."""
        return any(view.state not in (State.IDLE, State.FAILED) for view in self.seat_views)

    @property
    def _lasting_seats(self) -> list[Seat]:
        """Without those that go once they are empty."""
        return [seat for seat in self._seats if not seat.is_dismissed]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            for seat in self._seats:
                self._keep(seat)
            await self._dismissed.wait()

    def load(self, *, may_evict: bool) -> None:
        """Asks for all replicas that are not there. `may_evict`: idle models may be unloaded for the first of them."""
        self._may_evict = may_evict
        for seat in self._lasting_seats:
            seat.want()

    def adopt(self, index: int, engine: RunningEngine) -> bool:
        """Goes on with an engine of an earlier control process, if there is a seat for it. Before `run`."""
        if not 0 <= index < len(self._seats) or not self._seats[index].is_vacant:
            return False
        self._seats[index].adopt(engine)
        return True

    async def is_idle(self) -> bool:
        states = await asyncio.gather(*(seat.is_idle() for seat in self._seats))
        return all(states)

    async def count_running(self) -> int:
        """Generations that its engines say they work at."""
        return sum(await asyncio.gather(*(seat.count_running() for seat in self._seats)))

    def unload(self, grace_s: float | None = None) -> None:
        """Empties all seats, see `Seat.leave`; None: with the time that an eviction has, and engines that can sleep do
        so if they do not yet.
        """
        for seat in self._seats:
            if grace_s is not None:
                seat.leave(grace_s)
            else:
                seat.leave(self._grace_s, may_sleep=not (self.is_superseded or seat.is_asleep))

    def end_asleep(self) -> None:
        """Ends engines that sleep."""
        for seat in self._seats:
            if seat.is_asleep:
                seat.leave(0)

    def dismiss(self, grace_s: float) -> None:
        """Unloads it and ends `run`."""
        for seat in self._seats:
            seat.leave(grace_s, for_good=True)
        self._dismissed.set()

    def scale(self, replicas: int) -> None:
        """How many replicas it is to have; further ones are loaded at once if it is loaded. 0 unloads it."""
        was_loaded = self.is_loaded
        self.replicas = replicas
        for seat in self._lasting_seats[max(1, replicas) :]:
            seat.leave(self._grace_s, for_good=True)
        if replicas == 0:
            self.unload(self._grace_s)
        self._fill_seats()
        if was_loaded:
            for seat in self._lasting_seats[:replicas]:
                seat.want()
        self._on_change()

    def change(self, planned: PlannedDeployment) -> None:
        """New settings for the same engines."""
        before, self.planned = self.planned.settings, planned
        self._lives.change(planned)
        self.is_pinned = planned.settings.pinned
        if before.replicas != planned.settings.replicas or self.replicas != planned.settings.replicas:
            self.scale(planned.settings.replicas)

    def _fill_seats(self) -> None:
        """At least one: it shows the state of a deployment without replicas."""
        taken = {seat.index for seat in self._lasting_seats}
        for index in range(max(1, self.replicas)):
            if index in taken:
                continue
            seat = Seat(
                index,
                self.planned,
                self,
                self._lives,
                CrashHistory(self._make_backoff()),
                self._means,
                self._on_change,
                self._evicts,
            )
            self._seats.append(seat)
            if self._group is not None:
                self._keep(seat)

    def _keep(self, seat: Seat) -> None:
        assert self._group is not None
        task = self._group.create_task(seat.keep(), name=f"seat:{self.key}/{seat.index}")
        task.add_done_callback(lambda task: self._forget(task, seat))

    def _forget(self, task: "asyncio.Task[None]", seat: Seat) -> None:
        """It was dismissed and is empty. A cancelled one leaves its engine to a successor: what it showed holds."""
        if task.cancelled() or task.exception() is not None:
            return
        self.restarts += seat.restarts
        self._seats.remove(seat)
        self._on_change()

    def _evicts(self) -> bool:
        """Another model is unloaded for the first replica, not for one more."""
        return self._may_evict and all(seat.need is None or seat.is_asleep for seat in self._seats)
