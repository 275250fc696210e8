"""The slots of one deployment as this gateway has them: what is in flight never exceeds what the engines can run at
once; who comes next waits in the pool's queue, fairly, where a client that leaves costs nothing.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence

from helixflow.clients.pool import DeploymentView
from helixflow.core.call import Call
from helixflow.core.capacity import Replica
from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import HelixError
from helixflow.routing.load_wait import LoadWait, removed
from helixflow.routing.seats import Seat, SlotLease
from helixflow.routing.slot_desk import SlotDesk, Standing
from helixflow.routing.slot_waiter import Waiter
from helixflow.telemetry.metrics import QueueFigures

# Which of several seats with a free slot gets a call.
Choose = Callable[[Sequence[Seat], Call], Seat]


def least_loaded(seats: Sequence[Seat], call: Call) -> Seat:
    """A `Choose`."""
    return min(seats, key=_load)


class ReplicaSlots:
    """Implements `core.capacity.Slots` over the replicas that pools report through `update`.

    Of each pool that has the deployment there is a `SlotDesk`, which holds what the pool grants; where there will be no
    connection to the pool (`desk(…).expect` was never called) all slots are this gateway's.

    `request_load` is called when a request finds the deployment idle; it must not block. A replica on which a
    generation failed gets no new one for `probation_s`: if it crashed, the pool says so meanwhile, and requests wait
    for its successor instead of failing one after the other. `choose` picks among seats with a free slot, `forget` is
    told of a seat that has ended.
    """

    def __init__(
        self,
        deployment: str,
        *,
        max_queue: int,
        load_wait_s: float,
        request_load: Callable[[str], None],
        probation_s: float = 1.0,
        choose: Choose = least_loaded,
        forget: Callable[[str], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.deployment = deployment
        self.figures = QueueFigures()
        self._max_queue = max_queue
        self._probation_s = probation_s
        self._choose = choose
        self._forget = forget
        self._clock = clock if clock is not None else SystemClock()
        self._load_wait = LoadWait(deployment, load_wait_s, request_load)
        self._desks: dict[str, SlotDesk] = {}
        self._seats: dict[str, Seat] = {}
        # Seats that may get a generation: those on probation are left out.
        self._usable: list[Seat] = []
        self._probation: dict[str, asyncio.TimerHandle] = {}
        self._waiters: dict[Waiter, SlotDesk] = {}
        self._is_closed = False

    @property
    def max_queue(self) -> int:
        """How many requests may wait here."""
        return self._max_queue

    @max_queue.setter
    def max_queue(self, max_queue: int) -> None:
        self._max_queue = max_queue
        for desk in self._desks.values():
            desk.queue.limit = max_queue

    @property
    def queued(self) -> int:
        return len(self._waiters)

    @property
    def in_flight(self) -> int:
        return sum(seat.in_flight for desk in self._desks.values() for seat in desk.seats.values())

    @property
    def first_place(self) -> int:
        """The place of the first of our requests that wait, in the queue over all gateways; 0 without one."""
        places = [desk.first_place for desk in self._desks.values() if desk.first_place]
        return min(places, default=1 if self._waiters else 0)

    @property
    def has_waiters(self) -> bool:
        return bool(self._waiters)

    def desk(self, pool: str) -> SlotDesk:
        """The desk for a pool, made if there is none; `pool` is named as in `Replica.pool`."""
        desk = self._desks.get(pool)
        if desk is None:
            desk = self._desks[pool] = SlotDesk(pool, self, max_queue=self.max_queue, clock=self._clock)
        return desk

    def update(self, view: DeploymentView) -> None:
        """Takes over what the pools say now, together."""
        shown = {replica.replica_id: replica for replica in view.replicas}
        gone = [self._seats.pop(replica_id) for replica_id in list(self._seats) if replica_id not in shown]
        come = []
        for replica_id, replica in shown.items():
            seat = self._seats.get(replica_id)
            if seat is None:
                desk = self.desk(replica.pool)
                seat = desk.seats.setdefault(replica_id, Seat(replica_id, desk))
                self._seats[replica_id] = seat
                come.append(seat)
            elif seat.replica.slots != replica.slots:
                come.append(seat)
            seat.replica = replica
        for seat in gone:
            self._end_probation(seat)
            if self._forget is not None:
                self._forget(seat.seat_id)
        self._refresh()
        for seat in gone:
            seat.desk.hide(seat)
        for seat in come:
            seat.desk.show(seat)
        self._load_wait.update(view)
        if not self._seats:
            for waiter in list(self._waiters):
                self._dismiss(waiter)
                if not waiter.future.done():
                    waiter.future.set_result(None)

    def close(self) -> None:
        """The deployment is not served any more. Who waits is refused: the pool grants them nothing. Leases that are
        out stay good until they are released.
        """
        self._is_closed = True
        self._load_wait.close()
        for waiter in list(self._waiters):
            self._dismiss(waiter)
            waiter.fail(removed())
        for timer in self._probation.values():
            timer.cancel()
        for desk in self._desks.values():
            desk.retire()

    def replicas(self) -> list[Replica]:
        return [seat.replica for seat in self._seats.values()]

    def has_alternative(self) -> bool:
        return bool(self._usable)

    async def any_replica(self, deadline: float) -> Replica:
        await self._load_wait.until_served(deadline)
        return min(self._seats.values(), key=_load).replica

    async def acquire(self, call: Call, *, avoid: Collection[str] = ()) -> SlotLease:
        if not self._waiters:
            seat = self._free_seat(call, avoid)
            if seat is not None:
                return seat.desk.lend(seat, call.principal, 0)
        return await self._acquire_later(call, avoid)

    def _free_seat(self, call: Call, avoid: Collection[str]) -> Seat | None:
        free = [seat for seat in self._usable if seat.in_flight < seat.limit]
        if avoid:
            free = [seat for seat in free if seat.seat_id not in avoid]
        if not free:
            return None
        # With one replica there is nothing to choose; with one that is free, a choice is still remembered.
        return free[0] if len(self._usable) == 1 else self._choose(free, call)

    async def _acquire_later(self, call: Call, avoid: Collection[str]) -> SlotLease:
        lease: SlotLease | None = None
        while lease is None:
            if self._is_closed:
                raise removed()
            if not self._seats:
                await self._load_wait.until_served(call.deadline)
            seat = self._free_seat(call, avoid) if not self._waiters else None
            lease = seat.desk.lend(seat, call.principal, 0) if seat is not None else await self._wait(call, avoid)
        return lease

    async def _wait(self, call: Call, avoid: Collection[str]) -> SlotLease | None:
        loop = asyncio.get_running_loop()
        desk = self._shortest(avoid)
        waiter = Waiter(call, avoid, self._preferred(desk, call, avoid), loop.time())
        self._waiters[waiter] = desk
        timer = loop.call_at(call.deadline, self._expire, waiter)
        try:
            desk.enqueue(waiter)
            lease = await waiter.future
        except asyncio.CancelledError:
            future = waiter.future
            if not future.cancelled() and future.done() and future.exception() is None and (won := future.result()):
                # The slot was handed over in the same turn of the loop in which the client left.
                won.release()
            raise
        except HelixError:
            self.figures.refused += 1
            raise
        finally:
            timer.cancel()
            self._dismiss(waiter)
        if lease is not None:
            self.figures.waits.observe(loop.time() - waiter.since)
        return lease

    def _dismiss(self, waiter: Waiter) -> None:
        desk = self._waiters.pop(waiter, None)
        if desk is not None:
            desk.withdraw(waiter)

    def _expire(self, waiter: Waiter) -> None:
        if not waiter.future.done():
            waiter.refuse(max(self._waiters[waiter].wait_s, 1.0), queue_full=False)

    def _shortest(self, avoid: Collection[str]) -> SlotDesk:
        """The desk where it will probably be served first."""
        desks = {seat.desk for seat in self._seats.values() if seat.seat_id not in avoid}
        if len(desks) == 1:
            return desks.pop()
        return min(desks or {seat.desk for seat in self._seats.values()}, key=_promise)

    def _preferred(self, desk: SlotDesk, call: Call, avoid: Collection[str]) -> str:
        seats = [seat for seat in self._usable if seat.desk is desk and seat.seat_id not in avoid]
        return self._choose(seats, call).seat_id if len(seats) > 1 else ""

    # For desks.

    def serve(self, seat: Seat) -> None:
        """Gives free slots of it to those who wait."""
        if not seat.is_listed or seat.is_suspect:
            return
        local = seat.desk.standing is not Standing.CONNECTED
        while self._waiters and seat.in_flight < seat.limit:
            waiter = seat.desk.next_waiter(seat) if local else None
            if waiter is not None:
                self.hand_over(waiter, seat, waiter.estimate)
                continue
            # Nobody is being served before others here: it is lent to us, and whoever waits elsewhere may have it.
            elsewhere = (one for one, desk in self._waiters.items() if not local or desk is not seat.desk)
            waiter = next((one for one in elsewhere if seat.seat_id not in one.avoid), None)
            if waiter is None:
                return
            self._dismiss(waiter)
            self.hand_over(waiter, seat, 0)

    def hand_over(self, waiter: Waiter, seat: Seat, estimate: int) -> None:
        """A slot of it is the waiter's; `estimate` tokens were reserved for it."""
        self._waiters.pop(waiter, None)
        if not waiter.future.done():  # else its client left in this turn of the loop
            waiter.future.set_result(seat.desk.lend(seat, waiter.call.principal, estimate))

    def suspect(self, seat: Seat) -> None:
        """A generation on it has failed: it is left alone for a while."""
        if not seat.is_listed:
            return
        if seat.is_suspect:
            self._probation.pop(seat.seat_id).cancel()
        seat.is_suspect = True
        loop = asyncio.get_running_loop()
        self._probation[seat.seat_id] = loop.call_later(self._probation_s, self._trust, seat)
        self._refresh()
        seat.desk.ask_again()

    def _trust(self, seat: Seat) -> None:
        self._end_probation(seat)
        self._refresh()
        seat.desk.ask_again()
        seat.desk.settle(seat)

    def _end_probation(self, seat: Seat) -> None:
        timer = self._probation.pop(seat.seat_id, None)
        if timer is not None:
            timer.cancel()
        seat.is_suspect = False

    def _refresh(self) -> None:
        self._usable = [seat for seat in self._seats.values() if not seat.is_suspect]


def _load(seat: Seat) -> float:
    return seat.in_flight / seat.capacity


def _promise(desk: SlotDesk) -> tuple[float, float]:
    return desk.wait_s, (desk.queued + 1) / max(1, sum(seat.capacity for seat in desk.listed))
