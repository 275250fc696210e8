"""Who may use the slots of a deployment: lent ahead to gateways while nobody waits, else granted one by one to who is
next. Decided without I/O.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from helixflow.core.clock import Clock
from helixflow.pool.slot_session import Ask, Session
from helixflow.pool.slot_stock import SlotStock
from helixflow.routing.fair_queue import FairQueue, Refusal, Tenant
from helixflow.rpc.generated.pool_v1.pool_pb2 import LeaseSlotsRequest, LeaseSlotsResponse

# Nobody must have waited for so long before slots are lent ahead again.
CALM_S: Final = 0.1
_LEAST_WEIGHT: Final = 1
_COMMON: Final = Tenant("", "")


class SlotBroker:
    """The slots of one deployment.

    `on_change` is called when something has to be told that can wait: `tell` does it, and wants to be called again as
    long as it says so. `is_draining`: nothing more is lent or granted.
    """

    def __init__(self, *, max_queue: int, clock: Clock, on_change: Callable[[], None]) -> None:
        self.stock = SlotStock(clock)
        self.last_used = 0.0
        self.is_draining = False
        self._now = clock.monotonic
        self._on_change = on_change
        self._queue: FairQueue[Ask] = FairQueue(clock, limit=max_queue)
        self._sessions: list[Session] = []
        self._contended = False
        self._calm_since = 0.0

    @property
    def busy(self) -> int:
        """Slots with a running generation, and requests that wait."""
        lost = self.stock.missing
        return len(self._queue) + lost + sum(sum(session.busy.values()) for session in self._sessions)

    @property
    def held(self) -> int:
        """Slots that gateways have, used or not."""
        return sum(sum(session.held.values()) for session in self._sessions)

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    def held_of(self, replica_id: str) -> int:
        """The same of one replica: once none are held, none of its generations is of a gateway that is connected."""
        return sum(session.held.get(replica_id, 0) for session in self._sessions)

    def limit_queue(self, max_queue: int) -> None:
        """How many may wait from now on."""
        self._queue.limit = max_queue

    def busy_of(self, replica_id: str) -> int:
        return sum(session.busy.get(replica_id, 0) for session in self._sessions)

    def reported_of(self, replica_id: str) -> dict[str, int]:
        """Generations on a replica as the gateways have reported them, for `SlotStock.found`."""
        return {session.gateway: session.low.get(replica_id, 0) for session in self._sessions}

    def update(
        self, replicas: Mapping[str, int], *, closing: Collection[str] = (), inherited: Collection[str] = ()
    ) -> None:
        """The replicas that there are, with their slots. Those that are `closing` get nothing new and are recalled;
        those `inherited` ran before this broker did, and may be in use by gateways that have not said so yet.
        """
        gone, closed = self.stock.update(replicas, closing=closing, inherited=inherited)
        for replica_id in gone:
            for session in self._sessions:
                for counts in (session.held, session.busy, session.low, session.recalled):
                    counts.pop(replica_id, None)
        for replica_id in closed:
            self._recall(replica_id)
        self._queue.slots = sum(replicas.values())
        self.serve()

    def drain(self, *, resume: bool) -> None:
        """Takes back all that is lent, and gives nothing more; or begins again."""
        if not self.is_draining and not resume:
            for replica_id in self.stock.replicas:
                self._recall(replica_id)
        self.is_draining = not resume
        self.serve()

    # Gateways.

    def join(
        self, gateway: str, holding: Iterable[LeaseSlotsRequest.Holding], send: Callable[[LeaseSlotsResponse], None]
    ) -> Session:
        """A gateway has connected and says what it holds. Whatever else was lent to it comes back."""
        for stale in [session for session in self._sessions if session.gateway == gateway]:
            self.leave(stale)
        session = Session(gateway, send)
        self.stock.settle_with(gateway)
        for one in holding:
            slots = max(one.slots, one.busy)
            if slots and self.stock.claim(one.replica_id, slots):
                session.held[one.replica_id] = slots
                session.busy[one.replica_id] = session.low[one.replica_id] = one.busy
        self._sessions.append(session)
        self._sessions.sort(key=lambda one: one.gateway)
        # At once: should this process end now, gateways go by what they know of each other.
        self._tell_all()
        self._level(session)
        self.serve()
        return session

    def leave(self, session: Session) -> None:
        """Its stream is broken. What it held may still be in use."""
        if session not in self._sessions:
            return
        self._sessions.remove(session)
        for waiting in session.asks.values():
            self._queue.cancel(waiting)
        session.asks.clear()
        for tenant, reserved in session.reserved.items():
            self._queue.charge(tenant, 0, reserved)
        self.stock.lose(session.gateway, session.held)
        session.held, session.busy, session.low = {}, {}, {}
        self._tell_all()
        self.serve()
        self._on_change()

    def receive(self, session: Session, message: LeaseSlotsRequest) -> None:
        """What a gateway says after its first message."""
        if session not in self._sessions:
            return  # another stream of the same gateway has taken its place
        match message.WhichOneof("kind"):
            case "wait":
                self._on_wait(session, message.wait)
            case "cancel":
                waiting = session.asks.pop(message.cancel.ticket, None)
                if waiting is not None:
                    self._queue.cancel(waiting)
                    self._settle()
            case "give_back":
                self._on_return(session, message.give_back)
            case "report":
                self._on_report(session, message.report)

    def _on_wait(self, session: Session, wait: LeaseSlotsRequest.Wait) -> None:
        avoid, prefer = frozenset(wait.avoid), tuple(wait.prefer)
        known = session.asks.get(wait.ticket)
        if known is not None:
            known.item.avoid, known.item.prefer = avoid, prefer
            self.serve()
            return
        tenant = Tenant(
            wait.organisation,
            wait.key,
            max(wait.organisation_weight, _LEAST_WEIGHT),
            max(wait.key_weight, _LEAST_WEIGHT),
        )
        session.tell_of(tenant)
        ask = Ask(session, wait.ticket, prefer, avoid)
        if not len(self._queue) and (replica_id := self._free_for(ask)) is not None:
            self._queue.serve_now(tenant, wait.estimate)
            session.reserve(tenant, wait.estimate)
            self._grant(ask, replica_id)
            return
        # Slots that others were lent and do not use are on their way once it is said that somebody waits.
        spare = sum(max(0, other.idle) for other in self._sessions if other is not session)
        answer = self._queue.offer(
            tenant,
            ask,
            priority=wait.priority,
            estimate=wait.estimate,
            deadline=self._now() + wait.deadline_ms / 1000,
            certain=len(self._queue) < spare and not self.is_draining,
        )
        if isinstance(answer, Refusal):
            refuse = LeaseSlotsResponse.Refuse(
                ticket=wait.ticket, retry_after_s=answer.retry_after_s, queue_full=answer.queue_full
            )
            session.send(LeaseSlotsResponse(refuse=refuse))
            return
        session.asks[wait.ticket] = answer
        if not self._contended:
            self._contended = True
            self._tell_all()
        self._on_change()

    def _on_return(self, session: Session, returned: LeaseSlotsRequest.Return) -> None:
        held = session.held.get(returned.replica_id, 0)
        slots = min(returned.slots, held)
        if not slots:
            return  # of a replica that is gone
        session.held[returned.replica_id] = held - slots
        busy = session.busy.get(returned.replica_id, 0)
        session.busy[returned.replica_id] = min(busy, held - slots)
        low = session.low.get(returned.replica_id, 0)
        session.low[returned.replica_id] = min(low, held - slots)
        recalled = session.recalled.get(returned.replica_id, 0)
        session.recalled[returned.replica_id] = max(0, recalled - slots)
        self.stock.put_back(returned.replica_id, slots)
        self.last_used = self._now()
        self.serve()

    def _on_report(self, session: Session, report: LeaseSlotsRequest.Report) -> None:
        for holding in report.busy:
            if holding.replica_id in session.held:
                session.busy[holding.replica_id] = min(holding.slots, session.held[holding.replica_id])
                session.low[holding.replica_id] = holding.slots
                self.stock.saw_busy(holding.replica_id, session.gateway, holding.busy)
        for charge in report.charges:
            tenant = Tenant(
                charge.organisation,
                charge.key,
                max(charge.organisation_weight, _LEAST_WEIGHT),
                max(charge.key_weight, _LEAST_WEIGHT),
            )
            self._queue.charge(tenant, charge.tokens, charge.settled)
            session.reserve(tenant, -charge.settled)
            session.tell_of(tenant)
        self._queue.note_held(report.held_s, report.ended)
        self.last_used = self._now()
        self._on_change()

    # Slots.

    def serve(self) -> None:
        """Grants what is free to those who wait; lends it ahead when nobody does."""
        if not self.is_draining:
            while len(self._queue):
                waiting = self._queue.take(lambda ask: self._free_for(ask) is not None)
                if waiting is None:
                    break
                ask = waiting.item
                ask.session.asks.pop(ask.ticket, None)
                replica_id = self._free_for(ask)
                assert replica_id is not None
                ask.session.reserve(waiting.tenant, waiting.estimate)
                self._grant(ask, replica_id)
        self._settle()
        if not self._contended:
            self._lend()

    def tell(self) -> bool:
        """Tells gateways how it stands, where that has changed; ends contention that has passed. Whether it wants to
        be called again soon, without a further `on_change`.
        """
        if self._contended and not len(self._queue) and self._now() - self._calm_since >= CALM_S:
            self._contended = False
            self._tell_all()
            self._lend()
        self._tell_all()
        return self._contended

    def _settle(self) -> None:
        if self._contended and not len(self._queue):
            self._calm_since = self._now()
            self._on_change()

    def _free_for(self, ask: Ask) -> str | None:
        if self.is_draining:
            return None
        free = {one: slots for one, slots in self.stock.free().items() if one not in ask.avoid}
        if not free:
            return None
        return next((one for one in ask.prefer if one in free), None) or max(free, key=lambda one: free[one])

    def _grant(self, ask: Ask, replica_id: str) -> None:
        # It counts as busy at once, until it is reported: else it would seem to be lent ahead.
        session = ask.session
        session.busy[replica_id] = session.busy.get(replica_id, 0) + 1
        self._give(session, replica_id, 1, ask.ticket)

    def _give(self, session: Session, replica_id: str, slots: int, ticket: int) -> None:
        self.stock.take(replica_id, slots)
        session.held[replica_id] = session.held.get(replica_id, 0) + slots
        grant = LeaseSlotsResponse.Grant(ticket=ticket, replica_id=replica_id, slots=slots)
        session.send(LeaseSlotsResponse(grant=grant))

    def _lend(self) -> None:
        """All that is free, so that what gateways have idle is even: who uses most gets most."""
        if not self._sessions or self.is_draining:
            return
        gifts: dict[tuple[Session, str], int] = {}
        idle = {session: session.idle for session in self._sessions}
        free = dict(self.stock.free())
        while free:
            replica_id = max(free, key=lambda one: free[one])
            poorest = min(self._sessions, key=lambda one: (idle[one], sum(one.held.values())))
            gifts[poorest, replica_id] = gifts.get((poorest, replica_id), 0) + 1
            idle[poorest] += 1
            free[replica_id] -= 1
            if not free[replica_id]:
                del free[replica_id]
        for (session, replica_id), slots in gifts.items():
            self._give(session, replica_id, slots, 0)

    def _level(self, newcomer: Session) -> None:
        """Others give back what they have idle beyond an even share, for the one that has just come."""
        if self._contended or len(self._sessions) < 2:
            return
        coming = sum(sum(session.recalled.values()) for session in self._sessions)
        share = (coming + sum(max(0, session.idle) for session in self._sessions)) // len(self._sessions)
        for session in self._sessions:
            spare = {
                name: held - session.busy.get(name, 0) - session.recalled.get(name, 0)
                for name, held in session.held.items()
            }
            recalls: dict[str, int] = {}
            for _ in range(session.idle - share if session is not newcomer else 0):
                most = max(spare, key=lambda name: spare[name])
                spare[most] -= 1
                recalls[most] = recalls.get(most, 0) + 1
            for replica_id, slots in recalls.items():
                self._send_recall(session, replica_id, slots)

    def _recall(self, replica_id: str) -> None:
        for session in self._sessions:
            if held := session.held.get(replica_id, 0) - session.recalled.get(replica_id, 0):
                self._send_recall(session, replica_id, held)

    def _send_recall(self, session: Session, replica_id: str, slots: int) -> None:
        session.recalled[replica_id] = session.recalled.get(replica_id, 0) + slots
        session.send(LeaseSlotsResponse(recall=LeaseSlotsResponse.Recall(replica_id=replica_id, slots=slots)))

    # Status.

    def _tell_all(self) -> None:
        for session in self._sessions:
            status = self._status(session)
            if status != session.told:
                session.told = status
                session.send(LeaseSlotsResponse(status=status))

    def _status(self, session: Session) -> LeaseSlotsResponse.Status:
        status = LeaseSlotsResponse.Status(
            gateways=len(self._sessions),
            position=self._sessions.index(session),
            queued=len(self._queue),
            contended=self._contended,
            wait_s=round(self._queue.predict_s(_COMMON, 0), 2) if len(self._queue) else 0.0,
        )
        if session.asks:
            status.first_place = min(self._queue.place(waiting) for waiting in session.asks.values())
        if self._contended:
            for tenant in session.tenants.values():
                organisation, key = self._queue.standing(tenant)
                status.counters.add(
                    organisation=tenant.organisation,
                    key=tenant.key,
                    organisation_tokens=organisation,
                    key_tokens=key,
                )
        return status
