"""Limits and budgets as a gateway sees them: values, and which of them a call must fit."""

from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Final

DAY_MS: Final = 86_400_000


class Scope(Enum):
    """What a policy is on. The values are those of `Scope` in proto/helixflow/auth/v1/metering.proto."""

    INSTALLATION = 1
    ORGANISATION = 2
    PROJECT = 3
    USER = 4
    KEY = 5


class Metric(Enum):
    """What a limit counts; values of the proto."""

    REQUESTS_PER_MINUTE = 1
    TOKENS_PER_MINUTE = 2
    TOKENS_PER_DAY = 3
    PARALLEL_REQUESTS = 4

    __hash__ = object.__hash__

    @property
    def window_s(self) -> int:
        """Seconds that the limit's value is for; 0 for parallel requests."""
        return {1: 60, 2: 60, 3: 86_400, 4: 0}[self.value]


class Unit(Enum):
    """What a budget is of; values of the proto."""

    MONEY = 1
    TOKENS = 2


class Period(Enum):
    """How long a budget lasts; values of the proto."""

    DAY = 1
    MONTH = 2
    TOTAL = 3


@dataclass(frozen=True, slots=True)
class Limit:
    """`value` a window at most, of which `burst` at once; for parallel requests `value` at the same time."""

    id: str
    organisation_id: str
    scope: Scope
    subject_id: str
    model: str
    metric: Metric
    value: int
    burst: int


@dataclass(frozen=True, slots=True)
class Budget:
    """At most `cap` nanodollars or tokens in a period."""

    id: str
    organisation_id: str
    scope: Scope
    subject_id: str
    unit: Unit
    period: Period
    cap: int


@dataclass(frozen=True, slots=True)
class Policies:
    """What applies to one principal, for all models; `for_model` gives what a call must fit."""

    limits: tuple[Limit, ...] = ()
    budgets: tuple[Budget, ...] = ()
    # The keys that the caller's was rotated from: what is on them holds for it.
    predecessors: tuple[str, ...] = ()
    # Of all of them, for the journal.
    ids: tuple[str, ...] = field(init=False, compare=False)
    # Whether it matters what a call costs.
    have_money: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", (*(limit.id for limit in self.limits), *(budget.id for budget in self.budgets)))
        object.__setattr__(self, "have_money", any(budget.unit is Unit.MONEY for budget in self.budgets))

    def __bool__(self) -> bool:
        return bool(self.limits or self.budgets)

    def for_model(self, model: str) -> "Policies":
        """Limits of other models left out. Remember the result: this is not for the hot path."""
        limits = tuple(limit for limit in self.limits if limit.model in ("", model))
        return Policies(limits, self.budgets, self.predecessors)


NO_POLICIES: Final = Policies()


@lru_cache(maxsize=64)
def period_bounds(period: Period, day: int) -> tuple[int, int]:
    """Start and end of the period that day number `day` (since the epoch, UTC) lies in, milliseconds; (0, 0): TOTAL."""
    if period is Period.TOTAL:
        return 0, 0
    if period is Period.DAY:
        return day * DAY_MS, (day + 1) * DAY_MS
    from datetime import date, timedelta

    first = (date(1970, 1, 1) + timedelta(days=day)).replace(day=1)
    following = (first + timedelta(days=32)).replace(day=1)
    epoch = date(1970, 1, 1)
    return (first - epoch).days * DAY_MS, (following - epoch).days * DAY_MS
