"""What a gateway alone has counted: rates, calls at the same time, budgets. Pure state; nobody waits here."""

from typing import Final, Protocol

from helixflow.core.call import Meter
from helixflow.metering.gcra import NEVER, Rate
from helixflow.metering.policies import Limit, Metric, Unit
from helixflow.metering.spend import BudgetPeriod

# What a limit's counter says in headers about.
REQUESTS: Final = 1
TOKENS: Final = 2
SILENT: Final = 0

# How soon to ask again for what running calls will give back: they do not say when.
HELD_RETRY_US: Final = 1_000_000

_FOREVER_MS: Final = 1 << 62
_KINDS: Final = {
    Metric.REQUESTS_PER_MINUTE: REQUESTS,
    Metric.TOKENS_PER_MINUTE: TOKENS,
    Metric.TOKENS_PER_DAY: TOKENS,
}


class LimitCounter(Protocol):
    """The state of one limit. `held` are the calls in flight that have taken from it; moments are microseconds.

    `value` and `burst` are of the limit that it was last used with: `adopt` another one when they differ.
    """

    kind: int
    name: str
    value: int
    burst: int
    held: int

    def adopt(self, limit: Limit, now_us: int) -> None: ...

    def wait_us(self, now_us: int, amount: int) -> int:
        """As `Rate.check`."""
        ...

    def take(self, now_us: int, amount: int) -> int:
        """For a call that begins. Returns what is left."""
        ...

    def settle(self, now_us: int, taken: int, tokens: int) -> None:
        """The call has ended, and used so many tokens."""
        ...

    def release(self, taken: int) -> None:
        """The call has never been."""
        ...

    def left(self, now_us: int) -> int: ...

    def meter(self, now_us: int) -> Meter: ...

    def is_idle(self, now_us: int) -> bool:
        """Whether forgetting it changes nothing, and has not for a while."""
        ...


class RateCounter:
    """Requests or tokens in a window."""

    __slots__ = ("_rate", "_tat", "burst", "held", "kind", "name", "value")

    def __init__(self, limit: Limit) -> None:
        self.name = f"l:{limit.id}"
        self.kind = _KINDS[limit.metric]
        self.value = limit.value
        self.burst = limit.burst
        self.held = 0
        self._rate = _rate(limit)
        self._tat = 0

    def adopt(self, limit: Limit, now_us: int) -> None:
        self.value, self.burst = limit.value, limit.burst
        rate = _rate(limit)
        self._tat = rate.adopted(self._tat, now_us, self._rate)
        self._rate = rate

    def wait_us(self, now_us: int, amount: int) -> int:
        return self._rate.check(self._tat, now_us, amount)

    def take(self, now_us: int, amount: int) -> int:
        rate = self._rate
        self.held += 1
        self._tat = tat = rate.charge(self._tat, now_us, amount)
        return rate.remaining(tat, now_us)

    def settle(self, now_us: int, taken: int, tokens: int) -> None:
        self.held -= 1
        if self.kind == TOKENS and tokens != taken:
            if tokens < taken:
                self._tat = self._rate.refund(self._tat, taken - tokens)
            else:
                self._tat = self._rate.charge(self._tat, now_us, tokens - taken)

    def release(self, taken: int) -> None:
        self.held -= 1
        self._tat = self._rate.refund(self._tat, taken)

    def left(self, now_us: int) -> int:
        return self._rate.remaining(self._tat, now_us)

    def meter(self, now_us: int) -> Meter:
        rate, tat = self._rate, self._tat
        return Meter(self.value, rate.remaining(tat, now_us), rate.reset_us(tat, now_us) / 1e6)

    def is_idle(self, now_us: int) -> bool:
        return not self.held and self._rate.reset_us(self._tat, now_us - self._rate.window_us) == 0


class ParallelCounter:
    """Calls at the same time."""

    __slots__ = ("burst", "held", "kind", "name", "value")

    def __init__(self, limit: Limit) -> None:
        self.name = f"l:{limit.id}"
        self.kind = SILENT
        self.value = limit.value
        self.burst = limit.burst
        self.held = 0

    def adopt(self, limit: Limit, now_us: int) -> None:
        self.value, self.burst = limit.value, limit.burst

    def wait_us(self, now_us: int, amount: int) -> int:
        if self.held + amount <= self.value:
            return 0
        return HELD_RETRY_US if amount <= self.value else NEVER

    def take(self, now_us: int, amount: int) -> int:
        self.held += amount
        return self.value - self.held

    def settle(self, now_us: int, taken: int, tokens: int) -> None:
        self.held -= taken

    def release(self, taken: int) -> None:
        self.held -= taken

    def left(self, now_us: int) -> int:
        return max(self.value - self.held, 0)

    def meter(self, now_us: int) -> Meter:
        return Meter(self.value, self.left(now_us), 0.0)

    def is_idle(self, now_us: int) -> bool:
        return not self.held


def limit_counter(limit: Limit) -> LimitCounter:
    return ParallelCounter(limit) if limit.metric is Metric.PARALLEL_REQUESTS else RateCounter(limit)


def _rate(limit: Limit) -> Rate:
    # Nothing fits a limit of 0, whatever the rate: its burst is 0 too.
    return Rate(max(limit.value, 1), limit.metric.window_s * 1_000_000, limit.burst)


class BudgetCounter:
    """One budget in one period: what has been spent and what running calls have reserved, nanodollars or tokens.

    From `begin` to `know` the ledger is being asked: what is charged meanwhile is kept with its position in the
    journal, since the answer may contain it already.
    """

    __slots__ = ("_collected", "_known_to", "from_ms", "is_money", "name", "period", "reserved", "spent", "to_ms")

    def __init__(self, period: BudgetPeriod) -> None:
        self.period = period
        self.name = period.counter
        self.is_money = period.budget.unit is Unit.MONEY
        self.from_ms = period.from_ms
        self.to_ms = period.to_ms or _FOREVER_MS
        self.spent = 0
        self.reserved = 0
        self._known_to = 0
        self._collected: list[tuple[int, int]] | None = []

    @property
    def is_known(self) -> bool:
        return self._collected is None

    def know(self, spent: int, position: int) -> None:
        """What the ledger says, with all of our journal in it up to this position."""
        assert self._collected is not None
        self.spent = spent + sum(amount for at, amount in self._collected if at > position)
        self._known_to = position
        self._collected = None

    def has_room(self, amount: int, cap: int) -> bool:
        return self.spent + self.reserved + amount <= cap and self.spent < cap

    def settle(self, reserved: int, used: int) -> None:
        """Of a call that holds it: the ledger cannot have known of its end."""
        self.reserved -= reserved
        self.spent += used

    def charge(self, used: int, position: int) -> None:
        """Of a call that was admitted without it."""
        if self._collected is not None:
            self._collected.append((position, used))
        elif position > self._known_to:
            self.spent += used
