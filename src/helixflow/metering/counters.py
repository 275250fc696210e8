"""What a gateway alone has counted: rates, calls at the same time, budgets. Pure state; nobody waits here."""

from typing import Final, Protocol

from helixflow.core.call import Meter
from helixflow.metering.gcra import Bucket
from helixflow.metering.policies import Limit, Metric, Unit
from helixflow.metering.spend import BudgetPeriod

# What a limit counts, as far as headers are concerned.
SILENT: Final = 0
REQUESTS: Final = 1
TOKENS: Final = 2

# When to ask again for what running calls hold: they do not say when they end.
HELD_RETRY_US: Final = 1_000_000

_FOREVER_MS: Final = 1 << 62
_KINDS: Final = {
    Metric.REQUESTS_PER_MINUTE: REQUESTS,
    Metric.TOKENS_PER_MINUTE: TOKENS,
    Metric.TOKENS_PER_DAY: TOKENS,
}


class Counter(Protocol):
    """What a call may hold something of, until it is settled or released."""

    def settle(self, now_us: int, taken: int, tokens: int, cost: int) -> None:
        """A call that took so much has ended; it used so many tokens, for so many nanodollars."""
        ...

    def release(self, taken: int) -> None:
        """A call that took so much has never been."""
        ...


class LimitCounter(Counter, Protocol):
    """The state of one limit, of `kind` REQUESTS, TOKENS or SILENT. Moments are microseconds.

    `value` and `burst` are of the limit that it was last used with: when they differ, `change` comes first. `held` is
    the number of calls that have taken from it and will be settled or released: whoever takes adds one. `unit` is the
    hold of one.
    """

    kind: int
    name: str
    unit: tuple[str, int]
    value: int
    burst: int
    held: int

    def change(self, now_us: int, value: int, burst: int) -> None: ...

    def take(self, now_us: int, amount: int) -> bool:
        """For a call that begins; whether there was so much."""
        ...

    def wait_us(self, now_us: int, amount: int) -> int:
        """As `Bucket.wait_us`."""
        ...

    def meter(self, now_us: int) -> Meter: ...

    def is_idle(self, now_us: int) -> bool:
        """Whether forgetting it changes nothing, and has not for as long as its window."""
        ...


class RateCounter(Bucket):
    """Requests or tokens in a window."""

    __slots__ = ("held", "kind", "name", "unit")

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit.value, limit.metric.window_s * 1_000_000, limit.burst)
        self.name = f"l:{limit.id}"
        self.unit = self.name, 1
        self.kind = _KINDS[limit.metric]
        self.held = 0

    def settle(self, now_us: int, taken: int, tokens: int, cost: int) -> None:
        self.held -= 1
        if self.kind == TOKENS:
            if tokens < taken:
                self.give_back(taken - tokens)
            elif tokens > taken:
                self.owe(now_us, tokens - taken)

    def release(self, taken: int) -> None:
        self.held -= 1
        self.give_back(taken)

    def is_idle(self, now_us: int) -> bool:
        return not self.held and self.tat <= (now_us - self.window_us) * self.value


class ParallelCounter:
    """Calls at the same time: those that hold it."""

    __slots__ = ("burst", "held", "kind", "name", "unit", "value")

    def __init__(self, limit: Limit) -> None:
        self.name = f"l:{limit.id}"
        self.unit = self.name, 1
        self.kind = SILENT
        self.value = limit.value
        self.burst = limit.burst
        self.held = 0

    def change(self, now_us: int, value: int, burst: int) -> None:
        self.value, self.burst = value, burst

    def take(self, now_us: int, amount: int) -> bool:
        return self.held < self.value

    def wait_us(self, now_us: int, amount: int) -> int:
        return 0 if self.held < self.value else HELD_RETRY_US

    def settle(self, now_us: int, taken: int, tokens: int, cost: int) -> None:
        self.held -= 1

    def release(self, taken: int) -> None:
        self.held -= 1

    def meter(self, now_us: int) -> Meter:
        return Meter(self.value, max(self.value - self.held, 0), 0.0)

    def is_idle(self, now_us: int) -> bool:
        return not self.held


def limit_counter(limit: Limit) -> LimitCounter:
    return ParallelCounter(limit) if limit.metric is Metric.PARALLEL_REQUESTS else RateCounter(limit)


class BudgetCounter:
    """One budget in one period: what has been spent and what running calls have reserved, nanodollars or tokens.

    Until `know` the ledger is being asked: what is charged meanwhile is kept with its position in the journal, since
    the answer may contain it already. `asked_ms` is for who keeps it: when somebody was last seen to need it.
    """

    __slots__ = (
        "_collected",
        "_known_to",
        "asked_ms",
        "from_ms",
        "is_money",
        "name",
        "period",
        "reserved",
        "spent",
        "to_ms",
    )

    def __init__(self, period: BudgetPeriod) -> None:
        self.period = period
        self.name = period.counter
        self.is_money = period.budget.unit is Unit.MONEY
        self.from_ms = period.from_ms
        self.to_ms = period.to_ms or _FOREVER_MS
        self.spent = 0
        self.reserved = 0
        self.asked_ms = 0
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
        """What costs nothing does not fit either once all is spent."""
        return self.spent + self.reserved + amount <= cap and self.spent < cap

    def settle(self, now_us: int, taken: int, tokens: int, cost: int) -> None:
        # The ledger was asked before the call began, so its answer cannot contain it.
        self.reserved -= taken
        self.spent += cost if self.is_money else tokens

    def release(self, taken: int) -> None:
        self.reserved -= taken

    def charge(self, position: int, tokens: int, cost: int) -> None:
        """For a call that has ended and held nothing of it; `position` is that of its end in our journal."""
        used = cost if self.is_money else tokens
        if self._collected is not None:
            self._collected.append((position, used))
        elif position > self._known_to:
            self.spent += used
