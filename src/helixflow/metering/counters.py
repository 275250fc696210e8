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


class LimitCounter(Protocol):
    """The state of one limit, of `kind` REQUESTS, TOKENS or SILENT. Moments are microseconds.

    `value` and `burst` are of the limit that it was last used with: when they differ, `change` comes first. `held` is
    the number of calls that have begun and not ended.
    """

    kind: int
    value: int
    burst: int
    held: int

    def change(self, now_us: int, value: int, burst: int) -> None: ...

    def begin(self, now_us: int, tokens: int) -> tuple[str, int] | None:
        """For a call of so many tokens: its hold, or None and nothing taken. `end` or `undo` comes once for each."""
        ...

    def end(self, now_us: int, expected: int, tokens: int) -> None:
        """A call that began with so many tokens has used so many."""
        ...

    def undo(self, expected: int) -> None:
        """A call that began with so many tokens has never been."""
        ...

    def delay_us(self, now_us: int, tokens: int) -> int:
        """Until a call of so many tokens may begin, as `Bucket.wait_us`."""
        ...

    def meter(self, now_us: int) -> Meter: ...

    def is_idle(self, now_us: int) -> bool:
        """Whether forgetting it changes nothing, and has not for as long as its window."""
        ...


class _RateCounter(Bucket):
    """What is the same for requests and tokens in a window."""

    __slots__ = ("held", "name")

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit.value, limit.metric.window_s * 1_000_000, limit.burst)
        self.name = f"l:{limit.id}"
        self.held = 0

    def is_idle(self, now_us: int) -> bool:
        return not self.held and self.tat <= (now_us - self.window_us) * self.value


class RequestCounter(_RateCounter):
    """Requests in a window."""

    __slots__ = ("_unit",)
    kind = REQUESTS

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self._unit = self.name, 1

    def begin(self, now_us: int, tokens: int) -> tuple[str, int] | None:
        if not self.take(now_us, 1):
            return None
        self.held += 1
        return self._unit

    def end(self, now_us: int, expected: int, tokens: int) -> None:
        self.held -= 1

    def undo(self, expected: int) -> None:
        self.held -= 1
        self.give_back(1)

    def delay_us(self, now_us: int, tokens: int) -> int:
        return self.wait_us(now_us, 1)


class TokenCounter(_RateCounter):
    """Tokens in a window: as many as a call expects, corrected by what it has used."""

    __slots__ = ()
    kind = TOKENS

    def begin(self, now_us: int, tokens: int) -> tuple[str, int] | None:
        if not self.take(now_us, tokens):
            return None
        self.held += 1
        return self.name, tokens

    def end(self, now_us: int, expected: int, tokens: int) -> None:
        self.held -= 1
        if tokens < expected:
            self.give_back(expected - tokens)
        elif tokens > expected:
            self.owe(now_us, tokens - expected)

    def undo(self, expected: int) -> None:
        self.held -= 1
        self.give_back(expected)

    def delay_us(self, now_us: int, tokens: int) -> int:
        return self.wait_us(now_us, tokens)


class ParallelCounter:
    """Calls at the same time: those that hold it."""

    __slots__ = ("_unit", "burst", "held", "value")
    kind = SILENT

    def __init__(self, limit: Limit) -> None:
        self.value = limit.value
        self.burst = limit.burst
        self.held = 0
        self._unit = f"l:{limit.id}", 1

    def change(self, now_us: int, value: int, burst: int) -> None:
        self.value, self.burst = value, burst

    def begin(self, now_us: int, tokens: int) -> tuple[str, int] | None:
        if self.held >= self.value:
            return None
        self.held += 1
        return self._unit

    def end(self, now_us: int, expected: int, tokens: int) -> None:
        self.held -= 1

    def undo(self, expected: int) -> None:
        self.held -= 1

    def delay_us(self, now_us: int, tokens: int) -> int:
        return 0 if self.held < self.value else HELD_RETRY_US

    def meter(self, now_us: int) -> Meter:
        return Meter(self.value, max(self.value - self.held, 0), 0.0)

    def is_idle(self, now_us: int) -> bool:
        return not self.held


def limit_counter(limit: Limit) -> LimitCounter:
    if limit.metric is Metric.PARALLEL_REQUESTS:
        return ParallelCounter(limit)
    return RequestCounter(limit) if limit.metric is Metric.REQUESTS_PER_MINUTE else TokenCounter(limit)


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

    def begin(self, tokens_bound: int, cost_bound: int, cap: int) -> tuple[str, int] | None:
        """For a call of so much at most: its hold, or None and nothing taken. `end` or `undo` comes once for each."""
        amount = cost_bound if self.is_money else tokens_bound
        if not self.has_room(amount, cap):
            return None
        self.reserved += amount
        return self.name, amount

    def end(self, tokens_bound: int, cost_bound: int, tokens: int, cost: int) -> None:
        """A call that began with so much has used so much."""
        # The ledger was asked before the call began, so its answer cannot contain it.
        if self.is_money:
            self.reserved -= cost_bound
            self.spent += cost
        else:
            self.reserved -= tokens_bound
            self.spent += tokens

    def undo(self, tokens_bound: int, cost_bound: int) -> None:
        """A call that began with so much has never been."""
        self.reserved -= cost_bound if self.is_money else tokens_bound

    def charge(self, position: int, tokens: int, cost: int) -> None:
        """For a call that has ended and held nothing of it; `position` is that of its end in our journal."""
        used = cost if self.is_money else tokens
        if self._collected is not None:
            self._collected.append((position, used))
        elif position > self._known_to:
            self.spent += used
