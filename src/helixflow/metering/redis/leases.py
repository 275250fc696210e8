"""What this gateway may spend of each budget while Redis is away. Redis has it reserved for us."""

from collections.abc import Sequence
from itertools import islice
from typing import Final

from msgspec import Struct

from helixflow.metering.redis.calls import OpenCall
from helixflow.metering.redis.keys import epoch_key
from helixflow.metering.redis.plan import Plan, PlannedBudget

# Without a call for so long, it is given back.
IDLE_S: Final = 10.0
_MAX_WANTED: Final = 500

Wanted = list[tuple[str, int, int, int]]


class Lease(Struct, gc=False):
    """Of one budget: `amount` is held by Redis for us, of which `out` is taken by calls, running and ended, and of that
    `spent` by ended ones. `used_at` is on the event loop's clock."""

    kept: PlannedBudget
    used_at: float
    target: int = 0
    amount: int = 0
    out: int = 0
    spent: int = 0


class Leases:
    """All leases, by the places of their budgets. `per_mille` of what a budget has left, at most: so they never keep
    much of it from the other gateways, however many there are."""

    def __init__(self, per_mille: int) -> None:
        self._per_mille = per_mille
        self._leases: dict[str, Lease] = {}
        self._recent: set[Plan] = set()
        self._asked: list[Lease] = []
        self._now = 0.0

    @property
    def held(self) -> int:
        """How many there is something of."""
        return sum(1 for lease in self._leases.values() if lease.amount)

    def note(self, plan: Plan) -> None:
        """A call was granted by Redis: its budgets are in use."""
        self._recent.add(plan)

    def wanted(self, epoch: str, now: float) -> Wanted:
        """What to ask Redis for; what is to become less is less from now on, whether the answer comes or not."""
        for plan in self._recent if self._per_mille else ():
            for kept in plan.budgets:
                lease = self._leases.get(kept.place)
                if lease is None:
                    self._leases[kept.place] = Lease(kept, now)
                else:
                    lease.kept, lease.used_at = kept, now
        self._recent.clear()
        self._asked = []
        wanted: Wanted = []
        for lease in list(islice(self._leases.values(), _MAX_WANTED)):
            kept = lease.kept
            if lease.used_at + IDLE_S <= now:
                lease.target = 0
            lease.amount = min(lease.amount, lease.target)
            wanted.append((epoch_key(epoch, kept.place), kept.budget.cap, lease.target, 1 if kept.is_money else 2))
            self._asked.append(lease)
            # Last in the queue, for others to have their turn.
            self._leases[kept.place] = self._leases.pop(kept.place)
        self._now = now
        return wanted

    def got(self, answer: Sequence[int]) -> None:
        """For what was `wanted` last: (what the lease is now, what the budget has spent) each."""
        for lease, amount, spent in zip(self._asked, answer[::2], answer[1::2], strict=True):
            lease.amount = amount
            if lease.used_at + IDLE_S > self._now:
                lease.target = max(lease.kept.budget.cap - spent, 0) * self._per_mille // 1000
            elif not amount:
                self._leases.pop(lease.kept.place, None)
        self._asked = []

    def lower(self, place: str, left: int) -> None:
        """Redis has used it for a call that would not have fitted otherwise."""
        lease = self._leases.get(place)
        if lease is not None:
            lease.amount = min(lease.amount, left)

    def room(self, place: str) -> int:
        lease = self._leases.get(place)
        return 0 if lease is None else max(lease.amount - lease.out, 0)

    def take(self, place: str, amount: int) -> None:
        self._leases[place].out += amount

    def end(self, call: OpenCall, tokens: int, cost: int) -> None:
        """A call has ended that took from here; `tokens` below 0: it has never been."""
        for kept in call.plan.budgets:
            lease = self._leases[kept.place]
            reserved = call.cost_bound if kept.is_money else call.tokens_bound
            used = 0 if tokens < 0 else cost if kept.is_money else tokens
            lease.out += used - reserved
            lease.spent += used

    def close(self) -> dict[str, int]:
        """Nothing more is given from them; what has been spent, by places."""
        spent = {place: lease.spent for place, lease in self._leases.items() if lease.spent}
        for lease in self._leases.values():
            lease.amount = lease.spent = 0
        self._asked = []
        return spent

    def clear(self) -> None:
        """Redis holds none for us any more."""
        self._leases.clear()
        self._asked = []
