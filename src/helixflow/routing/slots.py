"""The slots of one deployment's replicas: in flight never exceeds what an engine can run at once; who comes next waits
here, first come first served, where a client that leaves costs nothing.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection

from helixflow.clients.pool import DeploymentView
from helixflow.core.call import Call
from helixflow.core.capacity import Replica
from helixflow.core.errors import ErrorKind, HelixError

_LOADING_RETRY_S = 5.0


class _Seat:
    """One replica and how many of its slots are taken."""

    __slots__ = ("in_flight", "replica")

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.in_flight = 0


class SlotLease:
    """The right to one generation on one replica."""

    __slots__ = ("_owner", "_released", "_seat")

    def __init__(self, owner: "ReplicaSlots", seat: _Seat) -> None:
        self._owner = owner
        self._seat = seat
        self._released = False

    @property
    def replica(self) -> Replica:
        return self._seat.replica

    def charge(self, tokens: int) -> None:
        """Nothing is shared by tokens yet."""

    def release(self, *, failed: bool = False) -> None:
        if not self._released:
            self._released = True
            self._owner._give_back(self._seat, failed=failed)


class ReplicaSlots:
    """Implements `core.capacity.Slots` over the replicas that the pool reports through `update`.

    `request_load` is called when a request finds the deployment idle; it must not block. A replica on which a
    generation failed gets no new one for `probation_s`: if it crashed, the pool says so meanwhile, and requests wait
    for its successor instead of failing one after the other.
    """

    def __init__(
        self,
        deployment: str,
        *,
        max_queue: int,
        load_wait_s: float,
        request_load: Callable[[str], None],
        probation_s: float = 1.0,
    ) -> None:
        self._deployment = deployment
        self._max_queue = max_queue
        self._load_wait_s = load_wait_s
        self._request_load = request_load
        self._probation_s = probation_s
        self._seats: dict[str, _Seat] = {}
        self._suspects: dict[str, float] = {}
        # The result None says that the replicas are gone and the wait for one begins anew.
        self._waiting: deque[asyncio.Future[SlotLease | None]] = deque()
        self._changed: asyncio.Event = asyncio.Event()
        self._view: DeploymentView | None = None

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        return sum(seat.in_flight for seat in self._seats.values())

    def update(self, view: DeploymentView) -> None:
        """Takes over what the pool says now."""
        self._view = view
        known = {replica.replica_id: replica for replica in view.replicas}
        for replica_id in [r for r in self._seats if r not in known]:
            del self._seats[replica_id]
        for replica_id, replica in known.items():
            seat = self._seats.get(replica_id)
            if seat is None:
                self._seats[replica_id] = _Seat(replica)
            else:
                seat.replica = replica
        self._suspects = {r: until for r, until in self._suspects.items() if r in known}
        self._changed.set()
        self._changed = asyncio.Event()
        self._wake()
        if not self._seats:
            while self._waiting:
                future = self._waiting.popleft()
                if not future.done():
                    future.set_result(None)

    def has_alternative(self) -> bool:
        now = asyncio.get_running_loop().time()
        return any(self._suspects.get(replica_id, 0.0) <= now for replica_id in self._seats)

    async def any_replica(self, deadline: float) -> Replica:
        await self._wait_for_replica(deadline)
        return min(self._seats.values(), key=lambda seat: seat.in_flight).replica

    async def acquire(self, call: Call, *, avoid: Collection[str] = ()) -> SlotLease:
        deadline = call.deadline
        lease: SlotLease | None = None
        while lease is None:
            await self._wait_for_replica(deadline)
            seat = self._free_seat() if not self._waiting else None
            lease = self._take(seat) if seat is not None else await self._wait_in_queue(deadline)
        return lease

    def _take(self, seat: _Seat) -> SlotLease:
        seat.in_flight += 1
        return SlotLease(self, seat)

    def _free_seat(self) -> _Seat | None:
        now = asyncio.get_running_loop().time()
        free = [seat for seat in self._seats.values() if seat.in_flight < seat.replica.slots]
        trusted = [seat for seat in free if self._suspects.get(seat.replica.replica_id, 0.0) <= now]
        return min(trusted, key=lambda seat: seat.in_flight / seat.replica.slots, default=None)

    def _give_back(self, seat: _Seat, *, failed: bool) -> None:
        seat.in_flight -= 1
        if failed:
            until = asyncio.get_running_loop().time() + self._probation_s
            self._suspects[seat.replica.replica_id] = until
            asyncio.get_running_loop().call_at(until, self._wake)
        self._wake()

    def _wake(self) -> None:
        """Hands free slots to those who have waited longest."""
        while self._waiting:
            seat = self._free_seat()
            if seat is None:
                return
            future = self._waiting.popleft()
            if not future.done():  # else its client left in this turn of the loop
                future.set_result(self._take(seat))

    async def _wait_in_queue(self, deadline: float) -> SlotLease | None:
        if self.queued >= self._max_queue:
            raise HelixError(
                ErrorKind.OVERLOADED,
                "The model is busy and its queue is full; try again shortly.",
                retry_after_s=_LOADING_RETRY_S,
            )
        future: asyncio.Future[SlotLease | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        timer = asyncio.get_running_loop().call_at(deadline, self._expire, future)
        try:
            return await future
        except asyncio.CancelledError:
            if future in self._waiting:
                self._waiting.remove(future)
            elif not future.cancelled() and future.exception() is None and (lease := future.result()) is not None:
                # The slot was handed over in the same turn of the loop in which the client left.
                lease.release()
            raise
        finally:
            timer.cancel()

    def _expire(self, future: "asyncio.Future[SlotLease | None]") -> None:
        if not future.done():
            self._waiting.remove(future)
            error = HelixError(
                ErrorKind.OVERLOADED, "The model is busy; the request waited too long.", retry_after_s=_LOADING_RETRY_S
            )
            future.set_exception(error)

    async def _wait_for_replica(self, deadline: float) -> None:
        """Returns when a replica serves; asks for one if the deployment is idle."""
        if self._seats:
            return
        loop = asyncio.get_running_loop()
        give_up = min(deadline, loop.time() + self._load_wait_s)
        asked = False
        while not self._seats:
            view = self._view
            state = view.state if view is not None else ""
            if view is not None and state in ("idle", "failed") and not asked:
                asked = True
                self._request_load(self._deployment)
            if view is not None and state == "failed":
                raise HelixError(
                    ErrorKind.UPSTREAM_UNAVAILABLE,
                    "The model could not be loaded; its administrator finds the reason in the service's log.",
                    retry_after_s=view.retry_after_s or 30,
                )
            changed = self._changed
            try:
                async with asyncio.timeout_at(give_up):
                    await changed.wait()
            except TimeoutError as exc:
                wait = view.retry_after_s if view is not None and view.retry_after_s else _LOADING_RETRY_S
                raise HelixError(
                    ErrorKind.LOADING, "The model is still loading; try again shortly.", retry_after_s=wait
                ) from exc
