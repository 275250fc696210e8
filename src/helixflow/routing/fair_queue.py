"""Who is next for a slot: a bounded queue, fair by tokens between organisations, and within one between its keys.

Decided without I/O; the pool keeps one for each deployment, and a gateway for as long as the pool is away.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Final, Generic, TypeVar

from helixflow.core.clock import Clock
from helixflow.routing.fair_shares import Account, Line

Item = TypeVar("Item")

# So long must nobody have waited before it is forgotten who has had how much: a queue that is empty for a moment is
# still the same rush.
QUIET_S: Final = 1.0
# One in so many grants goes to the priorities below the highest, in turn: they are slow then, and never stand still.
RELIEF_EVERY: Final = 16
# What a measurement counts against those before it.
_FOLLOW: Final = 0.1
# Counters of those who are idle, above the floor as they may be.
_MOST_IDLE: Final = 4096
_SPARE_COUNTERS: Final = 64
_LEAST_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose share something counts against."""

    organisation: str
    key: str
    organisation_weight: int = 100
    key_weight: int = 100


class Waiting(Generic[Item]):
    """A request that waits: `item` is the owner's. `estimate` tokens are reserved when it is taken."""

    __slots__ = ("deadline", "estimate", "item", "line", "priority", "since", "tenant")

    def __init__(self, tenant: Tenant, item: Item, priority: int, estimate: int, since: float, deadline: float) -> None:
        self.tenant = tenant
        self.item = item
        self.priority = priority
        self.estimate = estimate
        self.since = since
        self.deadline = deadline
        self.line: Line | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not to be served in time. After `retry_after_s` the same request would be let in, as things are now."""

    retry_after_s: float
    queue_full: bool


class FairQueue(Generic[Item]):
    """Higher priorities first; of one priority the organisation, and of that the key, which has had the fewest tokens
    by weight; of one key who came first.

    Tokens are counted with `charge` as they happen, and `estimate` of them is reserved when a request is taken, so
    that a tenant does not take all slots before its first token is counted: the owner charges only what exceeds the
    estimate, or gives the rest back with a negative charge. Who has not been waiting is lifted to what the one served
    last had used. Counters are forgotten once their tenant is idle and not above that, and all of them when nobody has
    waited for `QUIET_S`: nothing is counted then.

    Times are on the clock's monotonic scale. `slots` is how many can be served at once, for predictions.
    """

    def __init__(self, clock: Clock, *, limit: int) -> None:
        self._clock = clock
        self.limit = limit
        self.slots = 0
        self._accounts: dict[str, Account] = {}
        self._kept = 0
        self._sweep_at = _SPARE_COUNTERS
        self._floor = 0.0
        self._lines: dict[int, Line] = {}
        self._priorities: list[int] = []
        self._count = 0
        self._quiet_since = clock.monotonic()
        self._grants = 0
        self._relieved: dict[int, int] = {}
        self._held_s = 0.0
        self._ended = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Waiting[Item]]:
        """All that wait, by priority, in no order within one."""
        for priority in self._priorities:
            for organisation in self._lines[priority].members.values():
                for key in organisation.members.values():
                    yield from key.entries

    @property
    def counters(self) -> int:
        """How many counters of keys are kept."""
        return self._kept

    def offer(
        self,
        tenant: Tenant,
        item: Item,
        *,
        deadline: float,
        priority: int = 0,
        estimate: int = 0,
        certain: bool = False,
    ) -> Waiting[Item] | Refusal:
        """Lets a request wait, unless it could not be served in time. `certain`: a slot for it is on its way."""
        now = self._clock.monotonic()
        if not certain:
            if self._count >= self.limit:
                # By then as many have been served as there are slots.
                return Refusal(max(self._held_s, _LEAST_RETRY_S), queue_full=True)
            late_s = now + self.predict_s(tenant, priority) - deadline
            if late_s > 0:
                return Refusal(max(late_s, _LEAST_RETRY_S), queue_full=False)
        if not self._count and now - self._quiet_since >= QUIET_S:
            self._forget_all()
        waiting = Waiting(tenant, item, priority, estimate, now, deadline)
        self._add(waiting)
        return waiting

    def take(self, usable: Callable[[Item], bool] | None = None) -> Waiting[Item] | None:
        """Who is next of those who are `usable`; None when there is nobody. Who is past its deadline is left out for
        good: its owner has told it long since.
        """
        now = self._clock.monotonic()
        while self._count:
            waiting = self._next(usable)
            if waiting is None:
                return None
            if waiting.deadline < now:
                self.cancel(waiting)
                continue
            self._serve(waiting)
            return waiting
        return None

    def cancel(self, waiting: Waiting[Item]) -> bool:
        """It waits no longer. False if it had not been waiting any more."""
        key_line = waiting.line
        if key_line is None:
            return False
        waiting.line = None
        del key_line.entries[waiting]
        tenant, priority = waiting.tenant, waiting.priority
        organisation_line = key_line.parent
        assert organisation_line is not None
        whole = organisation_line.parent
        assert whole is not None
        for line in (key_line, organisation_line, whole):
            line.count -= 1
        if not key_line.count:
            assert key_line.account is not None
            organisation_line.drop(tenant.key, key_line.account.weight)
        if not organisation_line.count:
            assert organisation_line.account is not None
            whole.drop(tenant.organisation, organisation_line.account.weight)
        if not whole.count:
            del self._lines[priority]
            self._priorities.remove(priority)
            self._relieved.pop(priority, None)
        self._count -= 1
        if not self._count:
            self._quiet_since = self._clock.monotonic()
        return True

    def charge(self, tenant: Tenant, tokens: int, settled: int = 0) -> None:
        """Tokens that were used beyond estimates, or (negative) given back of them; `settled` is the sum of the
        estimates of requests that have ended.
        """
        if not self._count and self._clock.monotonic() - self._quiet_since >= QUIET_S:
            self._forget_all()
            return
        organisation = self._accounts.get(tenant.organisation)
        if tokens < 0 and (organisation is None or tenant.key not in organisation.keys):
            return  # forgotten meanwhile: it has no debt to be relieved of
        organisation, key = self._open(tenant)
        organisation.charge(tokens, settled)
        key.charge(tokens, settled)

    def note_held(self, held_s: float, ended: int) -> None:
        """Requests that have `ended` held their slots for so long together: what predictions are made from."""
        if ended <= 0:
            return
        mean = held_s / ended
        follow = 1 - (1 - _FOLLOW) ** ended
        self._held_s = mean if not self._ended else self._held_s + follow * (mean - self._held_s)
        self._ended += ended

    def predict_s(self, tenant: Tenant, priority: int) -> float:
        """How long a request that comes now would probably wait; 0.0 while nothing was measured."""
        if not self.slots or not self._held_s:
            return 0.0
        return (self._ahead(tenant, priority, 1) + 1) * self._held_s / self.slots

    def place(self, waiting: Waiting[Item]) -> int:
        """Its place, from 1, if it is the first of its key: how many are probably served until it is, with itself."""
        return self._ahead(waiting.tenant, waiting.priority, 0) + 1

    def standing(self, tenant: Tenant) -> tuple[float, float]:
        """How far the organisation's counter is above those of whoever was served last, and within it the key's."""
        organisation = self._accounts.get(tenant.organisation)
        if organisation is None:
            return 0.0, 0.0
        key = organisation.keys.get(tenant.key)
        return organisation.virtual - self._floor, key.virtual - organisation.floor if key is not None else 0.0

    def preset(self, tenant: Tenant, standing: tuple[float, float]) -> None:
        """Begins with counters as another queue's `standing` told them. Before anybody waits."""
        self._quiet_since = self._clock.monotonic()
        organisation, key = self._open(tenant)
        organisation.lift(self._floor + standing[0])
        key.lift(organisation.floor + standing[1])

    def serve_now(self, tenant: Tenant, estimate: int) -> None:
        """A request was served without having to wait: it counts as if it had been taken."""
        if not self._count and self._clock.monotonic() - self._quiet_since >= QUIET_S:
            self._forget_all()
            return
        organisation, key = self._open(tenant)
        if not key.lines:
            key.lift(organisation.floor)
        if not organisation.lines:
            organisation.lift(self._floor)
        self._count_in(organisation, key, estimate)

    def _ahead(self, tenant: Tenant, priority: int, own: int) -> int:
        """How many are probably served before it: its key gets its share. `own` of 1: after its own others."""
        higher = sum(self._lines[one].count for one in self._priorities if one > priority)
        whole = self._lines.get(priority)
        if whole is None:
            return higher
        organisations, keys, waiting = whole.weight, 0.0, 0
        organisation = whole.members.get(tenant.organisation)
        if organisation is None:
            organisations += tenant.organisation_weight
            keys = tenant.key_weight
        else:
            keys = organisation.weight
            key = organisation.members.get(tenant.key)
            if key is None:
                keys += tenant.key_weight
            else:
                waiting = key.count
        turns = (waiting * own + 1) * organisations * keys / (tenant.organisation_weight * tenant.key_weight)
        return higher + min(whole.count - (1 - own), ceil(turns) - 1)

    def _next(self, usable: Callable[[Item], bool] | None) -> Waiting[Item] | None:
        for priority in self._order():
            line = self._lines[priority]
            waiting: Waiting[Item] = next(iter(line.lead().lead().entries))
            if usable is None or usable(waiting.item):
                return waiting
            for waiting in _in_order(line):
                if usable(waiting.item):
                    return waiting
        return None

    def _order(self) -> list[int]:
        """Priorities, in the order in which the next grant goes through them."""
        priorities = self._priorities
        if len(priorities) > 1 and (self._grants + 1) % RELIEF_EVERY == 0:
            longest = min(priorities[1:], key=lambda priority: self._relieved.get(priority, 0))
            return [longest, *(priority for priority in priorities if priority != longest)]
        return priorities

    def _serve(self, waiting: Waiting[Item]) -> None:
        assert waiting.line is not None
        key = waiting.line.account
        assert key is not None
        self._grants += 1
        self._relieved[waiting.priority] = self._grants
        self.cancel(waiting)
        self._count_in(self._accounts[waiting.tenant.organisation], key, waiting.estimate)

    def _count_in(self, organisation: Account, key: Account, estimate: int) -> None:
        organisation.floor = max(organisation.floor, key.used)
        self._floor = max(self._floor, organisation.used)
        organisation.reserve(estimate)
        key.reserve(estimate)
        if self._kept > self._sweep_at:
            self._sweep()

    def _add(self, waiting: Waiting[Item]) -> None:
        tenant, priority = waiting.tenant, waiting.priority
        organisation, key = self._open(tenant)
        if not key.lines:
            key.lift(organisation.floor)
            # Weights change with the settings of a key; while it waits it has those that it came with.
            key.weight = tenant.key_weight
        if not organisation.lines:
            organisation.lift(self._floor)
            organisation.weight = tenant.organisation_weight
        whole = self._lines.get(priority)
        if whole is None:
            whole = self._lines[priority] = Line(priority, None, None)
            self._priorities.append(priority)
            self._priorities.sort(reverse=True)
            self._relieved[priority] = self._grants
        organisation_line = whole.member(tenant.organisation, organisation)
        key_line = organisation_line.member(tenant.key, key)
        key_line.entries[waiting] = None
        waiting.line = key_line
        for line in (key_line, organisation_line, whole):
            line.count += 1
        self._count += 1

    def _open(self, tenant: Tenant) -> tuple[Account, Account]:
        organisation = self._accounts.get(tenant.organisation)
        if organisation is None:
            organisation = Account(self._floor, tenant.organisation_weight)
            self._accounts[tenant.organisation] = organisation
        key = organisation.keys.get(tenant.key)
        if key is None:
            key = organisation.keys[tenant.key] = Account(organisation.floor, tenant.key_weight)
            self._kept += 1
        return organisation, key

    def _sweep(self) -> None:
        """Forgets keys that are idle and not above the floor; and of more than can be kept, those nearest to it."""
        idle = sorted(
            (max(organisation.virtual - self._floor, 0.0) + max(key.virtual - organisation.floor, 0.0), name, key_name)
            for name, organisation in self._accounts.items()
            for key_name, key in organisation.keys.items()
            if not key.lines
        )
        excess = len(idle) - _MOST_IDLE
        for above, name, key_name in idle:
            if above > 0 and excess <= 0:
                break
            organisation = self._accounts[name]
            del organisation.keys[key_name]
            if not organisation.keys:
                del self._accounts[name]
            self._kept -= 1
            excess -= 1
        self._sweep_at = 2 * self._kept + _SPARE_COUNTERS

    def _forget_all(self) -> None:
        self._accounts.clear()
        self._kept = 0
        self._floor = 0.0


def _in_order(line: Line) -> Iterator[Waiting[Item]]:
    """All that wait in it, who has had least first, as far as the counters now tell."""
    if line.entries:
        yield from line.entries
    else:
        for member in sorted(line.members.values(), key=_virtual):
            yield from _in_order(member)


def _virtual(line: Line) -> float:
    return line.account.virtual if line.account is not None else 0.0
