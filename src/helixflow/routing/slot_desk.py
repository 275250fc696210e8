"""What a gateway has to do with one pool over the slots of one deployment: what it holds, asks for, gives back and
reports; and how it goes on while the pool is away. No I/O of its own but timers.
"""

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Final, Protocol

from helixflow.core.clock import Clock
from helixflow.core.principal import Principal
from helixflow.routing.fair_queue import FairQueue, Refusal, Tenant
from helixflow.routing.seats import Account, Seat, SlotLease
from helixflow.routing.slot_usage import SlotUsage
from helixflow.routing.slot_waiter import Waiter
from helixflow.rpc.generated.pool_v1.pool_pb2 import LeaseSlotsRequest, LeaseSlotsResponse

REPORT_S: Final = 0.2
# A pool that was lost may be alive, and others may have got what it had lent to us: only after so long we go by shares.
AWAY_AFTER_S: Final = 1.0
# A replica that was granted and is not shown after so long is not waited for.
_UNSEEN_S: Final = 1.0
_MOST_WITHDRAWN: Final = 256

Send = Callable[[LeaseSlotsRequest], None]


class Standing(Enum):
    """How a desk stands with its pool."""

    # There is no connection and there will be none: all slots are ours.
    ALONE = "alone"
    # What we hold has been told, and the pool has not answered yet: nothing new begins.
    OPENING = "opening"
    CONNECTED = "connected"
    # The connection has just broken, or there was none yet: what was granted goes on being used.
    LOST = "lost"
    # Slots are used by shares, of which each gateway knows its own.
    AWAY = "away"


class Owner(Protocol):
    """The slots of the deployment, over all pools."""

    @property
    def has_waiters(self) -> bool: ...

    def serve(self, seat: Seat) -> None:
        """A slot of it may be free for somebody who waits."""
        ...

    def hand_over(self, waiter: Waiter, seat: Seat, estimate: int) -> None:
        """A slot of it is the waiter's; `estimate` tokens were reserved for it."""
        ...

    def suspect(self, seat: Seat) -> None:
        """A generation on it has failed."""
        ...


class SlotDesk:
    """Seats of one deployment at one pool, which is named as in `Replica.pool`.

    `armed` while a report is due. What the pool last said: `contended` (slots that become free go back to it), `queued`
    requests over all gateways, `first_place` of ours, `wait_s` that a new one would probably wait.
    """

    def __init__(self, pool: str, owner: Owner, *, max_queue: int, clock: Clock) -> None:
        self.pool = pool
        self.seats: dict[str, Seat] = {}
        self.standing = Standing.ALONE
        self.armed = False
        self.contended = False
        self.queued = 0
        self.first_place = 0
        self.wait_s = 0.0
        self.tickets: dict[int, Waiter] = {}
        self.queue: FairQueue[Waiter] = FairQueue(clock, limit=max_queue)
        self._owner = owner
        self._now = clock.monotonic
        self._send: Send | None = None
        self._usage = SlotUsage(self.queue)
        self._unseen: dict[str, list[Waiter]] = {}
        # A slot may have been granted for them meanwhile.
        self._withdrawn: dict[int, Waiter] = {}
        self._counters: Iterable[LeaseSlotsResponse.Counter] = ()
        self._gateways, self._position = 1, 0
        self._last_ticket = 0
        self._going_away: asyncio.TimerHandle | None = None

    @property
    def listed(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.is_listed]

    # Leases.

    def lend(self, seat: Seat, principal: Principal, estimate: int) -> SlotLease:
        """A slot of a seat that has one free."""
        seat.in_flight += 1
        if not self.armed:
            self._arm()
        return SlotLease(seat, principal, estimate, self._now())

    def end(self, seat: Seat, began_at: float, *, failed: bool) -> None:
        """A lease was released."""
        in_flight = seat.in_flight = seat.in_flight - 1
        if in_flight < seat.low:
            seat.low = in_flight
        self._usage.end(self._now() - began_at)
        if not self.armed:
            self._arm()
        if failed:
            self._owner.suspect(seat)
        if self.contended or seat.owed or self._owner.has_waiters or not seat.is_listed:
            self.settle(seat)

    def account(self, principal: Principal) -> Account:
        """Where the tokens of a tenant are counted until the next report."""
        return self._usage.account(principal)

    # Waiting.

    def enqueue(self, waiter: Waiter) -> None:
        """Lets it wait here; one that would wait too long is refused at once or soon."""
        if self.standing is not Standing.CONNECTED:
            self._offer(waiter)
        elif len(self.tickets) >= self.queue.limit and self.queued >= self.queue.limit:
            # The pool would say the same: it need not be asked for each.
            waiter.refuse(max(self.wait_s, 1.0), queue_full=True)
        else:
            self._ask(waiter)

    def withdraw(self, waiter: Waiter) -> None:
        """It waits here no longer."""
        if waiter.waiting is not None:
            self.queue.cancel(waiter.waiting)
            waiter.waiting = None
        elif self.tickets.pop(waiter.ticket, None) is not None and self._send is not None:
            self._withdrawn[waiter.ticket] = waiter
            if len(self._withdrawn) > _MOST_WITHDRAWN:
                del self._withdrawn[next(iter(self._withdrawn))]
            self._send(LeaseSlotsRequest(cancel=LeaseSlotsRequest.Cancel(ticket=waiter.ticket)))

    def ask_again(self) -> None:
        """Which seats are to be avoided has changed."""
        for waiter in self.tickets.values():
            self._send_wait(waiter)

    def settle(self, seat: Seat) -> None:
        """Slots of it have become free, or may be used otherwise than before."""
        if seat.seat_id in self._unseen:
            return
        if self.standing is Standing.CONNECTED:
            free = seat.granted - seat.in_flight
            if free > 0:
                due = free if self.contended or not seat.is_listed else min(free, seat.owed)
                if due:
                    self._give_back(seat, due)
        if not seat.is_listed and not seat.in_flight and (not seat.granted or self.standing is not Standing.CONNECTED):
            self.seats.pop(seat.seat_id, None)
        self._owner.serve(seat)

    def next_waiter(self, seat: Seat) -> Waiter | None:
        """Of those who wait in the queue of our own."""
        if not len(self.queue):
            return None
        self._usage.flush()
        waiting = self.queue.take(lambda waiter: seat.seat_id not in waiter.avoid)
        if waiting is None:
            return None
        waiting.item.waiting = None
        return waiting.item

    # Seats.

    def show(self, seat: Seat) -> None:
        """The replica of a seat has come, or its slots have changed."""
        seat.is_listed = True
        if self.standing is Standing.ALONE:
            seat.limit = seat.replica.slots
        elif self.standing is Standing.AWAY:
            self._share_out()
        for waiter in self._unseen.pop(seat.seat_id, ()):
            self._hand_over(waiter, seat)
        self.settle(seat)

    def hide(self, seat: Seat) -> None:
        """The pool shows the replica no more."""
        seat.is_listed = False
        if self.standing is Standing.AWAY:
            self._share_out()
        self.settle(seat)

    # The connection.

    def expect(self) -> None:
        """There will be a connection: only what the pool grants is used, for a moment."""
        if self.standing is Standing.ALONE:
            self._lose()

    def open(self, send: Send, gateway: str, deployment: str) -> None:
        """A connection stands: tells the pool what is held."""
        self._stay()
        self.standing = Standing.OPENING
        self._send = send
        holding = []
        for seat in self.seats.values():
            seat.granted = seat.limit = seat.low = seat.reported = seat.in_flight
            seat.owed = 0
            if busy := seat.in_flight:
                holding.append(LeaseSlotsRequest.Holding(replica_id=seat.seat_id, slots=busy, busy=busy))
        send(LeaseSlotsRequest(open=LeaseSlotsRequest.Open(deployment=deployment, gateway=gateway, holding=holding)))

    def receive(self, message: LeaseSlotsResponse) -> None:
        match message.WhichOneof("kind"):
            case "grant":
                self._on_grant(message.grant)
            case "recall":
                if (seat := self.seats.get(message.recall.replica_id)) is not None:
                    seat.owed = min(seat.owed + message.recall.slots, seat.granted)
                    self.settle(seat)
            case "refuse":
                waiter = self.tickets.pop(message.refuse.ticket, None)
                if waiter is not None:
                    waiter.refuse(message.refuse.retry_after_s, queue_full=message.refuse.queue_full)
            case "status":
                self._on_status(message.status)

    def lose(self) -> None:
        """The connection is broken."""
        if self.standing in (Standing.OPENING, Standing.CONNECTED):
            self._lose()

    def retire(self) -> None:
        """The deployment is not served any more: nothing is due. The pool takes back what it lent by itself."""
        self._stay()
        self.standing = Standing.ALONE
        self._send = None
        self.contended = False

    def _lose(self) -> None:
        self.standing = Standing.LOST
        self._send = None
        self.contended = False
        self.queued = self.first_place = 0
        for counter in self._counters:
            standing = (counter.organisation_tokens, counter.key_tokens)
            self.queue.preset(Tenant(counter.organisation, counter.key), standing)
        self._counters = ()
        for seat in list(self.seats.values()):
            seat.owed = 0
            seat.limit = seat.granted
        waiters, self.tickets = list(self.tickets.values()), {}
        for waiters_of_one in self._unseen.values():
            waiters += waiters_of_one
        self._unseen = {}
        for waiter in waiters:
            self._offer(waiter, certain=True)
        self._stay()
        self._going_away = asyncio.get_running_loop().call_later(AWAY_AFTER_S, self._go_away)
        for seat in list(self.seats.values()):
            self.settle(seat)

    def _go_away(self) -> None:
        self.standing = Standing.AWAY
        self._share_out()
        for seat in list(self.seats.values()):
            self.settle(seat)

    def _stay(self) -> None:
        if self._going_away is not None:
            self._going_away.cancel()
            self._going_away = None

    def _share_out(self) -> None:
        """Every gateway deals out all slots in the same order, and takes those that are its own."""
        dealt = 0
        for seat in sorted(self.listed, key=lambda seat: seat.seat_id):
            slots = seat.replica.slots
            seat.limit = sum((dealt + n) % self._gateways == self._position for n in range(slots))
            dealt += slots

    def _on_status(self, status: LeaseSlotsResponse.Status) -> None:
        self._gateways, self._position = max(1, status.gateways), status.position
        self.queued, self.first_place, self.wait_s = status.queued, status.first_place, status.wait_s
        self.contended = status.contended
        self._counters = status.counters
        if self.standing is Standing.OPENING:
            self.standing = Standing.CONNECTED
            for waiting in list(self.queue):
                self.queue.cancel(waiting)
                waiting.item.waiting = None
                self._ask(waiting.item)
        for seat in list(self.seats.values()):
            self.settle(seat)

    def _on_grant(self, grant: LeaseSlotsResponse.Grant) -> None:
        seat = self.seats.get(grant.replica_id)
        if seat is None:
            # Its stream is faster than the one that shows replicas.
            seat = self.seats[grant.replica_id] = Seat(grant.replica_id, self)
        seat.granted += grant.slots
        seat.limit = seat.granted
        if grant.ticket:
            # The pool takes it as used until it hears otherwise.
            seat.reported = -1
            if not self.armed:
                self._arm()
        waiter = self.tickets.pop(grant.ticket, None)
        if (withdrawn := self._withdrawn.pop(grant.ticket, None)) is not None:
            self._usage.decline(withdrawn)
        if not seat.is_listed:
            waiters = self._unseen.setdefault(seat.seat_id, [])
            if waiter is not None:
                waiters.append(waiter)
            asyncio.get_running_loop().call_later(_UNSEEN_S, self._give_up, seat)
        elif waiter is not None:
            self._hand_over(waiter, seat)
        self.settle(seat)

    def _give_up(self, seat: Seat) -> None:
        """The replica has not come."""
        waiters = self._unseen.pop(seat.seat_id, None)
        if waiters is None:
            return
        for waiter in waiters:
            self._usage.decline(waiter)
            if not waiter.future.done():
                self.enqueue(waiter)
        self.settle(seat)

    def _hand_over(self, waiter: Waiter, seat: Seat) -> None:
        """A slot that was granted for it."""
        if waiter.future.done():
            self._usage.decline(waiter)  # its client left in this turn of the loop
        elif seat.is_suspect or seat.seat_id in waiter.avoid:
            self._usage.decline(waiter)
            self._ask(waiter)  # avoiding it this time
        else:
            self._owner.hand_over(waiter, seat, waiter.estimate)

    # Messages.

    def _ask(self, waiter: Waiter) -> None:
        self._last_ticket += 1
        waiter.ticket = self._last_ticket
        self.tickets[waiter.ticket] = waiter
        self._send_wait(waiter)

    def _send_wait(self, waiter: Waiter) -> None:
        assert self._send is not None
        tenant = waiter.tenant
        left_s = waiter.call.deadline - asyncio.get_running_loop().time()
        suspects = {seat.seat_id for seat in self.seats.values() if seat.is_suspect}
        wait = LeaseSlotsRequest.Wait(
            ticket=waiter.ticket,
            organisation=tenant.organisation,
            key=tenant.key,
            organisation_weight=tenant.organisation_weight,
            key_weight=tenant.key_weight,
            priority=waiter.call.principal.priority,
            estimate=waiter.estimate,
            deadline_ms=max(0, int(left_s * 1000)),
            prefer=[waiter.prefer] if waiter.prefer else [],
            avoid=suspects | waiter.avoid,
        )
        self._send(LeaseSlotsRequest(wait=wait))

    def _give_back(self, seat: Seat, slots: int) -> None:
        assert self._send is not None
        seat.granted -= slots
        seat.limit = seat.granted
        seat.owed = max(0, seat.owed - slots)
        give_back = LeaseSlotsRequest.Return(replica_id=seat.seat_id, slots=slots)
        self._send(LeaseSlotsRequest(give_back=give_back))

    def _offer(self, waiter: Waiter, *, certain: bool = False) -> None:
        left_s = waiter.call.deadline - asyncio.get_running_loop().time()
        self.queue.slots = sum(seat.limit for seat in self.listed)
        answer = self.queue.offer(
            waiter.tenant,
            waiter,
            priority=waiter.call.principal.priority,
            estimate=waiter.estimate,
            deadline=self._now() + left_s,
            certain=certain,
        )
        if isinstance(answer, Refusal):
            waiter.refuse(answer.retry_after_s, queue_full=answer.queue_full)
        else:
            waiter.waiting = answer

    def _arm(self) -> None:
        self.armed = True
        asyncio.get_running_loop().call_later(REPORT_S, self._report)

    def _report(self) -> None:
        self.armed = False
        if self.standing is Standing.CONNECTED:
            assert self._send is not None
            report = self._usage.report(self.seats.values())
            if report.ByteSize():
                self._send(LeaseSlotsRequest(report=report))
        else:
            self._usage.flush()
            for seat in self.seats.values():
                seat.low = seat.reported = seat.in_flight
        if any(seat.in_flight for seat in self.seats.values()):
            self._arm()
