"""What was used at a desk since that was last reported: tokens by tenant, generations that ended, slots in use."""

from collections.abc import Iterable
from typing import Final

from helixflow.core.principal import Principal
from helixflow.routing.fair_queue import FairQueue
from helixflow.routing.seats import Account, Seat
from helixflow.routing.slot_waiter import Waiter, tenant_of
from helixflow.rpc.generated.pool_v1.pool_pb2 import LeaseSlotsRequest

_MOST_ACCOUNTS: Final = 1024


class SlotUsage:
    """Collects, and is emptied by a `report` to the pool or, without it, into the desk's own `queue`."""

    def __init__(self, queue: FairQueue[Waiter]) -> None:
        self._queue = queue
        self._accounts: dict[tuple[str, str], Account] = {}
        self._ended = 0
        self._held_s = 0.0

    def account(self, principal: Principal) -> Account:
        """Where the tokens of a tenant are counted."""
        name = (principal.organisation_id, principal.id)
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= _MOST_ACCOUNTS:
                self.flush()
            account = self._accounts[name] = Account(tenant_of(principal))
        return account

    def decline(self, waiter: Waiter) -> None:
        """What was reserved for it with its grant is not used."""
        account = self.account(waiter.call.principal)
        account.tokens -= waiter.estimate
        account.settled += waiter.estimate

    def end(self, held_s: float) -> None:
        """A generation has ended that held its slot for so long."""
        self._ended += 1
        self._held_s += held_s

    def report(self, seats: Iterable[Seat]) -> LeaseSlotsRequest.Report:
        report = LeaseSlotsRequest.Report(ended=self._ended, held_s=self._held_s)
        for account in self._take_accounts():
            tenant = account.tenant
            report.charges.add(
                organisation=tenant.organisation,
                key=tenant.key,
                tokens=account.tokens,
                organisation_weight=tenant.organisation_weight,
                key_weight=tenant.key_weight,
                settled=account.settled,
            )
            account.tokens = account.settled = 0
        for seat in seats:
            if seat.low != seat.reported or seat.in_flight != seat.reported:
                report.busy.add(replica_id=seat.seat_id, slots=seat.in_flight, busy=seat.low)
                seat.low = seat.reported = seat.in_flight
        self._take_times()
        return report

    def flush(self) -> None:
        """It counts in the queue of our own."""
        for account in self._take_accounts():
            self._queue.charge(account.tenant, account.tokens, account.settled)
            account.tokens = account.settled = 0
        self._take_times()

    def _take_times(self) -> None:
        self._queue.note_held(self._held_s, self._ended)
        self._ended, self._held_s = 0, 0.0

    def _take_accounts(self) -> list[Account]:
        """Those with something to tell; those that no lease counts in any more are forgotten."""
        accounts = [account for account in self._accounts.values() if account.tokens or account.settled]
        self._accounts = {name: account for name, account in self._accounts.items() if account.leases}
        return accounts
