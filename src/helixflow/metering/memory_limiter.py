"""Limits and budgets of an installation with one gateway: counted in its memory."""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import structlog
from msgspec import Struct

from helixflow.core.call import Meter
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Demand, Grant, Refusal, Settlement
from helixflow.metering.budget_book import BudgetBook
from helixflow.metering.counters import REQUESTS, TOKENS, BudgetCounter, LimitCounter, limit_counter
from helixflow.metering.gcra import NEVER
from helixflow.metering.money import MAX_NANODOLLARS
from helixflow.metering.policies import Budget, Limit, Policies, Unit
from helixflow.metering.spend import SpendReader

# How long a call waits to learn what a budget has left, if its deadline is not sooner.
LOAD_TIMEOUT_S: Final = 5.0
TIDY_S: Final = 5.0
# When to ask again for what running calls have reserved: they do not say when they end.
HELD_RETRY_S: Final = 1.0
# No call has used more; sums of many remain exact.
MAX_TOKENS: Final = 10**9
_SLICE: Final = 1_000
_NOTHING: Final = Grant()

log = structlog.get_logger("helixflow.metering")


class LimiterFigures(Struct, frozen=True):
    """For metrics. `overruns`: calls that cost more than they had reserved; `unknown`: calls refused since nobody could
    say what a budget has left; `failures`: questions that the ledger did not answer."""

    in_flight: int
    limits: int
    budgets: int
    loading: int
    overruns: int
    unknown: int
    failures: int


class _Tally(Struct, gc=False):
    """The counters of one `Policies`, looked up once for many calls: a third of what an admission takes.

    `limits` in the order of the policies, `requests` and `tokens` those of them that headers tell of. `budgets` are
    those of the moments from `from_ms`, before `to_ms`; none at first.
    """

    policies: Policies
    limits: tuple[LimitCounter, ...]
    requests: tuple[LimitCounter, ...]
    tokens: tuple[LimitCounter, ...]
    budgets: tuple[BudgetCounter, ...] = ()
    from_ms: int = 0
    to_ms: int = 0


class _Taken(Struct, gc=False):
    """A call in flight, and the counters that it has taken from what it asked for."""

    demand: Demand
    limits: tuple[LimitCounter, ...] = ()
    budgets: tuple[BudgetCounter, ...] = ()


class MemoryLimiter:
    """Implements `Limiter`. To be run for as long as it decides.

    What a call took is kept here until it is settled; one that is settled twice, or was never granted, changes nothing.
    Every call must be asked for and settled, those without policies too: a budget may be made while they run, and what
    they cost counts for it.
    """

    def __init__(
        self, spend: SpendReader, clock: Clock, *, journal_id: str, node_id: str, position: Callable[[], int]
    ) -> None:
        self._clock = clock
        self._monotonic = clock.monotonic
        self._limits: dict[str, LimitCounter] = {}
        # By the identity of their policies, which they keep alive. All go whenever a counter goes or is changed.
        self._tallies: dict[int, _Tally] = {}
        self._book = BudgetBook(
            spend, clock, journal_id=journal_id, node_id=node_id, position=position, forgotten=self._tallies.clear
        )
        self._in_flight: dict[str, _Taken] = {}
        self._overruns = self._unknown = 0

    @property
    def figures(self) -> LimiterFigures:
        book = self._book
        return LimiterFigures(
            in_flight=len(self._in_flight),
            limits=len(self._limits),
            budgets=len(book),
            loading=book.loading,
            overruns=self._overruns,
            unknown=self._unknown,
            failures=book.failures,
        )

    def try_admit(self, demand: Demand) -> Grant | None:
        policies = demand.policies
        if not policies.limits and not policies.budgets:
            self._in_flight[demand.call_id] = _Taken(demand)
            return _NOTHING
        now_us = int(self._monotonic() * 1_000_000)
        tally = self._tallies.get(id(policies))
        if tally is None:
            tally = self._tally(policies, now_us)
        # Taken one by one, and given back should one of the others refuse: nothing else runs in between.
        expected = demand.tokens
        holds: list[tuple[str, int]] = []
        for counter in tally.limits:
            hold = counter.begin(now_us, expected)
            if hold is None:
                _undo(demand, tally.limits[: len(holds)], ())
                self._refuse(demand, now_us)
            holds.append(hold)
        budgets = tally.budgets
        if policies.budgets:
            if not tally.from_ms <= demand.admitted_at_ms < tally.to_ms:
                if not self._turn_to(tally, demand.admitted_at_ms):
                    _undo(demand, tally.limits, ())
                    return None
                budgets = tally.budgets
            for kept, budget in zip(budgets, policies.budgets, strict=True):
                hold = kept.begin(demand.tokens_bound, demand.cost_bound, budget.cap)
                if hold is None:
                    _undo(demand, tally.limits, budgets[: len(holds) - len(tally.limits)])
                    self._refuse(demand, now_us)
                holds.append(hold)
        self._in_flight[demand.call_id] = _Taken(demand, tally.limits, budgets)
        return Grant(tuple(holds), _tightest(tally.requests, now_us), _tightest(tally.tokens, now_us))

    async def admit(self, demand: Demand) -> Grant:
        deadline = min(asyncio.get_running_loop().time() + LOAD_TIMEOUT_S, demand.deadline)
        while (grant := self.try_admit(demand)) is None:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._book.load(demand.policies.budgets, demand.admitted_at_ms)
            except TimeoutError as exc:
                self._unknown += 1
                message = "What is left of a budget cannot be told now: the ledger has not answered. Try again."
                raise HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=1) from exc
        return grant

    def settle(self, settlement: Settlement) -> None:
        taken = self._in_flight.pop(settlement.call_id, None)
        if taken is None:
            return
        # A settlement is not refused, whatever an engine has made of it.
        demand, tokens, cost = taken.demand, settlement.tokens, settlement.cost
        if not 0 <= tokens <= MAX_TOKENS:
            tokens = min(max(tokens, 0), MAX_TOKENS)
        if not 0 <= cost <= MAX_NANODOLLARS:
            cost = min(max(cost, 0), MAX_NANODOLLARS)
        if taken.limits:
            now_us, expected = int(self._monotonic() * 1_000_000), demand.tokens
            for counter in taken.limits:
                counter.end(now_us, expected, tokens)
        if taken.budgets:
            tokens_bound, cost_bound = demand.tokens_bound, demand.cost_bound
            for kept in taken.budgets:
                kept.end(tokens_bound, cost_bound, tokens, cost)
            if tokens > tokens_bound or (cost > cost_bound and demand.policies.have_money):
                self._note_overrun(demand, tokens, cost)
        self._book.charge_others(demand, settlement.position, tokens, cost, taken.budgets)

    def release(self, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            taken = self._in_flight.pop(settlement.call_id, None)
            if taken is not None:
                _undo(taken.demand, taken.limits, taken.budgets)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._book.run())
            while True:
                await asyncio.sleep(TIDY_S)
                await self.tidy()

    async def tidy(self) -> None:
        """Forgets what makes no difference any more, and loads what will soon be needed; `run` does it."""
        now_us = int(self._monotonic() * 1_000_000)
        # The book learns again which budgets are asked for, and policies that nobody has any more are let go.
        self._tallies.clear()
        for number, (limit_id, counter) in enumerate(list(self._limits.items())):
            if counter.is_idle(now_us):
                del self._limits[limit_id]
                # Calls came while others were looked at.
                self._tallies.clear()
            if number % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
        await self._book.tidy()

    async def close(self) -> None:
        """Nothing is on its way."""

    def _tally(self, policies: Policies, now_us: int) -> _Tally:
        limits = tuple(self._counter(limit, now_us) for limit in policies.limits)
        tally = self._tallies[id(policies)] = _Tally(
            policies,
            limits,
            tuple(counter for counter in limits if counter.kind == REQUESTS),
            tuple(counter for counter in limits if counter.kind == TOKENS),
        )
        return tally

    def _turn_to(self, tally: _Tally, at_ms: int) -> bool:
        """Its budgets become those of that moment; False while one is not known."""
        found = []
        for budget in tally.policies.budgets:
            kept = self._book.find(budget, at_ms)
            if kept is None:
                return False
            found.append(kept)
        tally.budgets = tuple(found)
        tally.from_ms, tally.to_ms = max(kept.from_ms for kept in found), min(kept.to_ms for kept in found)
        return True

    def _counter(self, limit: Limit, now_us: int) -> LimitCounter:
        counter = self._limits.get(limit.id)
        if counter is None:
            counter = self._limits[limit.id] = limit_counter(limit)
        elif counter.value != limit.value or counter.burst != limit.burst:
            # Whoever has other policies with it changes it back.
            self._tallies.clear()
            counter.change(now_us, limit.value, limit.burst)
        return counter

    def _note_overrun(self, demand: Demand, tokens: int, cost: int) -> None:
        """The cap holds only if estimates do: this one has not."""
        self._overruns += 1
        log.warning(
            "budget.overrun",
            call_id=demand.call_id,
            tokens=tokens,
            tokens_bound=demand.tokens_bound,
            cost=cost,
            cost_bound=demand.cost_bound,
        )

    def _refuse(self, demand: Demand, now_us: int) -> NoReturn:
        """For what has room again last: whoever waits less would be refused by it."""
        refusals = [*self._limits_against(demand, now_us), *self._budgets_against(demand)]
        refusal = max(refusals, key=_wait_s)
        counters = [self._counter(limit, now_us) for limit in demand.policies.limits]
        refusal.requests = _tightest([counter for counter in counters if counter.kind == REQUESTS], now_us)
        refusal.tokens = _tightest([counter for counter in counters if counter.kind == TOKENS], now_us)
        raise refusal

    def _limits_against(self, demand: Demand, now_us: int) -> list[Refusal]:
        refusals: list[Refusal] = []
        for limit in demand.policies.limits:
            counter = self._counter(limit, now_us)
            amount = demand.tokens if counter.kind == TOKENS else 1
            wait_us = counter.delay_us(now_us, demand.tokens)
            if wait_us == NEVER:
                refusals.append(Refusal(limit=limit, retry_after_s=None, too_large=True, requested=amount))
            elif wait_us:
                refusals.append(Refusal(limit=limit, retry_after_s=wait_us / 1e6, requested=amount))
        return refusals

    def _budgets_against(self, demand: Demand) -> list[Refusal]:
        refusals: list[Refusal] = []
        for budget in demand.policies.budgets:
            kept = self._book.find(budget, demand.admitted_at_ms)
            amount = demand.cost_bound if budget.unit is Unit.MONEY else demand.tokens_bound
            if kept is not None and not kept.has_room(amount, budget.cap):
                too_large = amount > budget.cap
                wait_s = None if too_large else self._budget_wait_s(budget, kept, amount)
                refusals.append(Refusal(budget=budget, retry_after_s=wait_s, too_large=too_large, requested=amount))
        return refusals

    def _budget_wait_s(self, budget: Budget, kept: BudgetCounter, amount: int) -> float | None:
        if kept.spent < budget.cap and kept.spent + amount <= budget.cap:
            # Running calls have reserved the room, and rarely use all that they have reserved.
            return HELD_RETRY_S
        return max(kept.to_ms / 1000 - self._clock.now(), 0.0) if kept.period.to_ms else None


def _undo(demand: Demand, limits: Sequence[LimitCounter], budgets: Sequence[BudgetCounter]) -> None:
    for counter in limits:
        counter.undo(demand.tokens)
    for kept in budgets:
        kept.undo(demand.tokens_bound, demand.cost_bound)


def _tightest(counters: Sequence[LimitCounter], now_us: int) -> Meter | None:
    tightest: Meter | None = None
    for counter in counters:
        meter = counter.meter(now_us)
        if tightest is None or meter.remaining < tightest.remaining:
            tightest = meter
    return tightest


def _wait_s(refusal: Refusal) -> float:
    return math.inf if refusal.retry_after_s is None else refusal.retry_after_s
