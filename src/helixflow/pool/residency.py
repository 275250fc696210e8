"""Who has memory: grants it to replicas that load, and makes idle models leave for them or for having been idle."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from helixflow.core.clock import Clock
from helixflow.pool.activity import Activity
from helixflow.pool.memory import Limits, Need
from helixflow.pool.memory_admission import Evict, Fits, Refuse, Resident, Wait, place, plan_admission

# How long what an engine said of itself is believed, and how often a model with a time to live is looked at while busy.
_BUSY_FOR_S: Final = 0.25
_BUSY_LOOK_S: Final = 1.0
log = structlog.get_logger("helixflow.pool")


class Tenant(Protocol):
    """A deployment, as far as its memory goes. Its replicas hold one `Room` each."""

    @property
    def key(self) -> str:
        """Unique; `deployment` need not be, while one is being replaced."""
        ...

    @property
    def deployment(self) -> str: ...

    @property
    def is_pinned(self) -> bool: ...

    @property
    def is_leaving(self) -> bool:
        """It was told to unload and has not done so yet."""
        ...

    @property
    def is_superseded(self) -> bool:
        """Another one is to take its place."""
        ...

    @property
    def is_asleep(self) -> bool:
        """It has been made to leave its GPUs, and is unloaded only for want of RAM."""
        ...

    @property
    def keep_alive_s(self) -> float:
        """Unloaded after so long without use; 0: never for that."""
        ...

    async def is_idle(self) -> bool:
        """Whether its engines say that they do nothing."""
        ...

    def unload(self) -> None:
        """Begins to unload; its rooms are released when that is done, or have no GPUs any more if it can sleep."""
        ...


class NoRoomError(Exception):
    """A replica cannot be loaded for want of memory; the text has the numbers. `is_final`: waiting does not help."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


class Room:
    """Memory that one replica has. Release it when its process has ended; that is idempotent."""

    def __init__(self, owner: "Residency", tenant: Tenant, need: Need, gpus: Mapping[str, int], since: float) -> None:
        self.tenant = tenant
        self.need = need
        self.gpus = gpus
        self.since = since
        self.is_loading = True
        self._owner = owner

    def settle(self) -> None:
        """It is loaded: from now on it may be asked to leave, though not at once."""
        self.is_loading = False
        self._owner._settled(self)

    def correct(self, need: Need) -> None:
        """It takes something else than was planned."""
        self.need = need

    def free_gpus(self) -> None:
        """It sleeps: only its RAM counts."""
        self.gpus = {}
        self._owner.wake()

    def take_over(self, other: "Room") -> None:
        """Has the GPUs of the other one from now on, which is released."""
        self.gpus = other.gpus
        other.release()

    def release(self) -> None:
        self._owner._release(self)


@dataclass(slots=True, eq=False)
class _Waiter:
    """A replica that wants to load. `evict`: idle models may be unloaded for it."""

    tenant: Tenant
    need: Need
    evict: bool
    room: "asyncio.Future[Room]"
    tell: Callable[[str], None]
    reason: str = ""


class Residency:
    """`run` it while memory is granted. All on one event loop.

    `read_limits` gets what our engines were given of each GPU, by UUID, and says what there is; it blocks and is called
    in a thread.
    """

    def __init__(
        self,
        read_limits: Callable[[Mapping[str, int]], Limits],
        activity: Activity,
        clock: Clock,
        *,
        min_residence_s: float = 0.0,
    ) -> None:
        self._read_limits = read_limits
        self._activity = activity
        self._clock = clock
        self._min_residence_s = min_residence_s
        self._limits = Limits(0)
        self._rooms: list[Room] = []
        self._waiters: list[_Waiter] = []
        self._seen_busy: dict[str, float] = {}
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._look = asyncio.Event()
        activity.on_idle(lambda _deployment: self._look.set())

    async def admit(
        self,
        tenant: Tenant,
        need: Need,
        *,
        deadline: float,
        evict: bool = True,
        tell: Callable[[str], None] = lambda _reason: None,
    ) -> Room:
        """Memory for one replica, once there is. `deadline` is on the monotonic clock; `tell` hears what is waited for.

        Without `evict` only what is free now counts. Raises `NoRoomError`.
        """
        self._limits = await asyncio.to_thread(self._read_limits, self._given())
        waiter = _Waiter(tenant, need, evict, asyncio.get_running_loop().create_future(), tell)
        self._waiters.append(waiter)
        self._look.set()
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                return await waiter.room
        except TimeoutError as exc:
            self._abandon(waiter)
            raise NoRoomError(f"no memory in time: {waiter.reason}", is_final=True) from exc
        except asyncio.CancelledError:
            self._abandon(waiter)
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._look.set()  # what was claimed for it is free for others

    def adopt(self, tenant: Tenant, need: Need, gpus: Mapping[str, int]) -> Room:
        """Memory of a replica that runs already."""
        room = Room(self, tenant, need, gpus, self._clock.monotonic())
        self._rooms.append(room)
        return room

    def wake(self) -> None:
        """Something that counts has changed: a pin, a time to live."""
        self._look.set()

    async def read_capacity(self) -> tuple[Limits, int]:
        """What engines may take in all, and the RAM that they take."""
        self._limits = await asyncio.to_thread(self._read_limits, self._given())
        return self._limits, sum(room.need.ram_bytes for room in self._rooms)

    async def run(self) -> None:
        """Looks whenever something changed, or becomes due. Until cancelled."""
        try:
            while True:
                self._look.clear()
                due = min(self._settle(), self._expire())
                delay_s = None if due == math.inf else max(0.0, due - self._clock.monotonic())
                try:
                    async with asyncio.timeout(delay_s):
                        await self._look.wait()
                except TimeoutError:
                    pass  # it is due
        finally:
            checks = tuple(self._checks.values())
            for check in checks:
                check.cancel()
            await asyncio.gather(*checks, return_exceptions=True)

    def _settle(self) -> float:
        """Decides for all who wait, in their order; returns when to look again without being told to."""
        now = self._clock.monotonic()
        due = math.inf
        claims: list[Resident] = []
        for waiter in tuple(self._waiters):
            if waiter.room.done():
                continue
            loaded = [*self._residents(waiter.tenant, now), *claims]
            decision = plan_admission(
                waiter.need,
                loaded,
                self._limits,
                now,
                min_residence_s=self._min_residence_s,
                evict=waiter.evict,
            )
            match decision:
                case Fits(gpus):
                    waiter.room.set_result(self.adopt(waiter.tenant, waiter.need, gpus))
                case Refuse(message):
                    waiter.room.set_exception(NoRoomError(message, is_final=waiter.evict))
                case Evict(keys):
                    for key in keys:
                        self._begin_eviction(key)
                    claims += self._claim(waiter, loaded, keys)
                    self._note(waiter, "waits for the memory of another model")
                case Wait(until, reason):
                    due = min(due, until if until is not None else math.inf)
                    claims += self._claim(waiter, loaded, ())
                    self._note(waiter, reason)
        self._seen_busy = {key: at for key, at in self._seen_busy.items() if at > now}
        return min([due, *self._seen_busy.values()]) if self._waiters else due

    def _claim(self, waiter: _Waiter, loaded: Sequence[Resident], leaving: Sequence[str]) -> list[Resident]:
        """What is being made free for this one is not for those behind it; nothing while that is not under way."""
        staying = [one for one in loaded if not one.leaving and one.key not in leaving]
        gpus = place(waiter.need, staying, self._limits)
        return [Resident("", waiter.need.ram_bytes, gpus, busy=True)] if gpus is not None else []

    def _note(self, waiter: _Waiter, reason: str) -> None:
        if reason != waiter.reason:
            waiter.reason = reason
            waiter.tell(reason)

    def _residents(self, wanting: Tenant, now: float) -> list[Resident]:
        """What is loaded, by tenant. The one that wants more is not evicted for that."""
        return [self._resident(tenant, rooms, tenant is wanting, now) for tenant, rooms in self._by_tenant()]

    def _by_tenant(self) -> list[tuple[Tenant, list[Room]]]:
        tenants: dict[str, tuple[Tenant, list[Room]]] = {}
        for room in self._rooms:
            tenants.setdefault(room.tenant.key, (room.tenant, []))[1].append(room)
        return list(tenants.values())

    def _resident(self, tenant: Tenant, rooms: Sequence[Room], is_wanting: bool, now: float) -> Resident:
        gpus: dict[str, int] = {}
        for room in rooms:
            for uuid, size in room.gpus.items():
                gpus[uuid] = gpus.get(uuid, 0) + size
        since = max(room.since for room in rooms)
        return Resident(
            tenant.key,
            sum(room.need.ram_bytes for room in rooms),
            gpus,
            busy=self._is_busy(tenant, rooms, now),
            pinned=tenant.is_pinned,
            leaving=tenant.is_leaving or tenant.key in self._checks,
            superseded=tenant.is_superseded,
            wanting=is_wanting,
            since=since,
            last_used=max(since, self._activity.last_used(tenant.deployment)),
        )

    def _is_busy(self, tenant: Tenant, rooms: Sequence[Room], now: float) -> bool:
        return (
            any(room.is_loading for room in rooms)
            or self._activity.busy(tenant.deployment) > 0
            or self._seen_busy.get(tenant.key, -math.inf) > now
        )

    def _expire(self) -> float:
        """Unloads what was not used for its time to live; returns when the next may be due."""
        now = self._clock.monotonic()
        due = math.inf
        for tenant, rooms in self._by_tenant():
            one = self._resident(tenant, rooms, False, now)
            if tenant.keep_alive_s <= 0 or one.leaving or tenant.is_asleep:
                continue
            ends = one.last_used + tenant.keep_alive_s
            if one.busy:
                due = min(due, now + max(_BUSY_LOOK_S, ends - now))
            elif ends > now:
                due = min(due, ends)
            else:
                self._begin_eviction(tenant.key)
        return due

    def _begin_eviction(self, key: str) -> None:
        tenant = next(room.tenant for room in self._rooms if room.tenant.key == key)
        if key not in self._checks:
            self._checks[key] = asyncio.create_task(self._evict(tenant), name=f"evict:{key}")

    async def _evict(self, tenant: Tenant) -> None:
        """Asks its engines first: a generation may have begun that nobody has told of yet."""
        try:
            if tenant.is_superseded or await tenant.is_idle():
                log.info("deployment.evicted", deployment=tenant.deployment)
                tenant.unload()
            else:
                self._seen_busy[tenant.key] = self._clock.monotonic() + _BUSY_FOR_S
        finally:
            del self._checks[tenant.key]
            self._look.set()

    def _given(self) -> dict[str, int]:
        given: dict[str, int] = {}
        for room in self._rooms:
            for uuid, size in room.gpus.items():
                given[uuid] = given.get(uuid, 0) + size
        return given

    def _abandon(self, waiter: _Waiter) -> None:
        """Its room may have been granted in the same turn of the loop in which it was given up."""
        room = waiter.room
        if room.done() and not room.cancelled() and room.exception() is None:
            room.result().release()

    def _settled(self, room: Room) -> None:
        room.since = self._clock.monotonic()
        self._seen_busy.pop(room.tenant.key, None)
        self._look.set()

    def _release(self, room: Room) -> None:
        if room in self._rooms:
            self._rooms.remove(room)
            self._look.set()
