"""One replica as a gateway has it: how many of its slots may be used here, and the leases on them."""

from typing import TYPE_CHECKING

from helixflow.core.capacity import Replica
from helixflow.core.principal import Principal
from helixflow.routing.fair_queue import Tenant

if TYPE_CHECKING:
    from helixflow.routing.slot_desk import SlotDesk

_UNSEEN = Replica("", "", 0, "", 1, 1)


class Account:
    """What a tenant has used since that was last reported, beyond estimates; `settled` is the sum of the estimates of
    what has ended. `leases` are those that count here and have not ended.
    """

    __slots__ = ("leases", "settled", "tenant", "tokens")

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.tokens = 0
        self.settled = 0
        self.leases = 0


class Seat:
    """A replica. `in_flight` of its slots have a generation of ours, and new ones may begin below `limit`; `granted`
    are ours as the pool sees it. Implements `balancing.Seat`.

    `is_listed` while the pool shows the replica; `is_suspect` while it is on probation. `owed` slots are to be given
    back to the pool as they become free. `low` is the fewest in flight since the last report, `reported` how many there
    were then.
    """

    __slots__ = (
        "desk",
        "granted",
        "in_flight",
        "is_listed",
        "is_suspect",
        "limit",
        "low",
        "owed",
        "replica",
        "reported",
        "seat_id",
    )

    def __init__(self, replica_id: str, desk: "SlotDesk") -> None:
        self.seat_id = replica_id
        self.desk = desk
        self.replica = _UNSEEN
        self.in_flight = 0
        self.limit = 0
        self.granted = 0
        self.owed = 0
        self.low = 0
        self.reported = 0
        self.is_listed = False
        self.is_suspect = False

    @property
    def capacity(self) -> int:
        return self.replica.slots

    @property
    def is_measured(self) -> bool:
        """All replicas of a deployment are alike."""
        return False

    def latency_s(self, now: float) -> float:
        return 0.0

    def whole_latency_s(self, now: float) -> float:
        return 0.0


class SlotLease:
    """The right to one generation on one replica. `estimate` tokens were counted when it was granted."""

    __slots__ = ("_account", "_began_at", "_credit", "_estimate", "_principal", "_released", "_seat")

    def __init__(self, seat: Seat, principal: Principal, estimate: int, began_at: float) -> None:
        self._seat = seat
        self._principal = principal
        self._estimate = self._credit = estimate
        self._began_at = began_at
        self._account: Account | None = None
        self._released = False

    @property
    def replica(self) -> Replica:
        return self._seat.replica

    def charge(self, tokens: int) -> None:
        credit = self._credit
        if credit:
            if tokens <= credit:
                self._credit = credit - tokens
                return
            tokens -= credit
            self._credit = 0
        account = self._account
        if account is None:
            if self._released:
                return
            account = self._open_account()
        account.tokens += tokens

    def release(self, *, failed: bool = False) -> None:
        if self._released:
            return
        self._released = True
        if self._estimate:
            account = self._account if self._account is not None else self._open_account()
            account.tokens -= self._credit
            account.settled += self._estimate
            self._credit = 0
        if self._account is not None:
            self._account.leases -= 1
        self._seat.desk.end(self._seat, self._began_at, failed=failed)

    def _open_account(self) -> Account:
        account = self._account = self._seat.desk.account(self._principal)
        account.leases += 1
        return account
