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
from helixflow.metering.counters import REQUESTS, TOKENS, BudgetCounter, Counter, LimitCounter, limit_counter
from helixflow.metering.gcra import NEVER
from helixflow.metering.money import MAX_NANODOLLARS
from helixflow.metering.policies import Budget, Limit, Unit
from helixflow.metering.spend import SpendReader

# How long a call waits to learn what a budget has left, if its deadline is not sooner.
LOAD_TIMEOUT_S: Final = 5.0
TIDY_S: Final = 5.0
# When to ask again for what running calls have reserved: they do not say when they end.
HELD_RETRY_S: Final = 1.0
# No call has used more; sums of many remain exact.
MAX_TOKENS: Final = 10**9
_SLICE: Final = 1_000

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


class _Taken(Struct, gc=False):
    """A call in flight, and what it has taken: as much as its holds say, in their order."""

    demand: Demand
    counters: Sequence[Counter]
    holds: tuple[tuple[str, int], ...]


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
        self._book = BudgetBook(spend, clock, journal_id=journal_id, node_id=node_id, position=position)
        self._limits: dict[str, LimitCounter] = {}
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
            self._in_flight[demand.call_id] = _Taken(demand, (), ())
            return Grant()
        now_us = int(self._monotonic() * 1_000_000)
        # Taken one by one, and given back should one of the others refuse: nothing else runs in between.
        counters: list[Counter] = []
        holds: list[tuple[str, int]] = []
        requests: LimitCounter | None = None
        tokens: LimitCounter | None = None
        for limit in policies.limits:
            counter = self._limits.get(limit.id)
            if counter is None or counter.value != limit.value or counter.burst != limit.burst:
                counter = self._counter(limit, now_us)
            kind = counter.kind
            hold = (counter.name, demand.tokens) if kind == TOKENS else counter.unit
            if not counter.take(now_us, hold[1]):
                _give_back(counters, holds)
                self._refuse(demand, now_us)
            counter.held += 1
            counters.append(counter)
            holds.append(hold)
            if kind == REQUESTS:
                requests = counter if requests is None else _tighter(requests, counter, now_us)
            elif kind == TOKENS:
                tokens = counter if tokens is None else _tighter(tokens, counter, now_us)
        at_ms = demand.admitted_at_ms
        for budget in policies.budgets:
            kept = self._book.current.get(budget.id)
            if kept is None or not kept.from_ms <= at_ms < kept.to_ms:
                kept = self._book.find(budget, at_ms)
                if kept is None:
                    _give_back(counters, holds)
                    return None
            amount = demand.cost_bound if kept.is_money else demand.tokens_bound
            if not kept.has_room(amount, budget.cap):
                _give_back(counters, holds)
                self._refuse(demand, now_us)
            kept.reserved += amount
            counters.append(kept)
            holds.append((kept.name, amount))
        taken = tuple(holds)
        self._in_flight[demand.call_id] = _Taken(demand, counters, taken)
        return Grant(
            taken,
            None if requests is None else requests.meter(now_us),
            None if tokens is None else tokens.meter(now_us),
        )

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
        demand, tokens = taken.demand, min(max(settlement.tokens, 0), MAX_TOKENS)
        cost = min(max(settlement.cost, 0), MAX_NANODOLLARS)
        if taken.counters:
            now_us = int(self._monotonic() * 1_000_000)
            for counter, (_, amount) in zip(taken.counters, taken.holds, strict=True):
                counter.settle(now_us, amount, tokens, cost)
            policies = demand.policies
            if policies.budgets and (
                tokens > demand.tokens_bound or (policies.have_money and cost > demand.cost_bound)
            ):
                self._note_overrun(demand, tokens, cost)
        self._book.charge_others(demand, settlement.position, tokens, cost, taken.counters)

    def release(self, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            taken = self._in_flight.pop(settlement.call_id, None)
            if taken is not None:
                _give_back(taken.counters, taken.holds)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._book.run())
            while True:
                await asyncio.sleep(TIDY_S)
                await self.tidy()

    async def tidy(self) -> None:
        """Forgets what makes no difference any more, and loads what will soon be needed; `run` does it."""
        now_us = int(self._monotonic() * 1_000_000)
        for number, (limit_id, counter) in enumerate(list(self._limits.items())):
            if counter.is_idle(now_us):
                del self._limits[limit_id]
            if number % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
        await self._book.tidy()

    async def close(self) -> None:
        """Nothing is on its way."""

    def _counter(self, limit: Limit, now_us: int) -> LimitCounter:
        counter = self._limits.get(limit.id)
        if counter is None:
            counter = self._limits[limit.id] = limit_counter(limit)
        elif counter.value != limit.value or counter.burst != limit.burst:
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
        refusal.requests = self._tightest(demand, REQUESTS, now_us)
        refusal.tokens = self._tightest(demand, TOKENS, now_us)
        raise refusal

    def _limits_against(self, demand: Demand, now_us: int) -> list[Refusal]:
        refusals: list[Refusal] = []
        for limit in demand.policies.limits:
            counter = self._counter(limit, now_us)
            amount = demand.tokens if counter.kind == TOKENS else 1
            wait_us = counter.wait_us(now_us, amount)
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

    def _tightest(self, demand: Demand, kind: int, now_us: int) -> Meter | None:
        meters = [
            counter.meter(now_us)
            for counter in (self._counter(limit, now_us) for limit in demand.policies.limits)
            if counter.kind == kind
        ]
        return min(meters, key=_remaining, default=None)


def _give_back(counters: Sequence[Counter], holds: Sequence[tuple[str, int]]) -> None:
    for counter, (_, amount) in zip(counters, holds, strict=True):
        counter.release(amount)


def _tighter(one: LimitCounter, other: LimitCounter, now_us: int) -> LimitCounter:
    return other if other.meter(now_us).remaining < one.meter(now_us).remaining else one


def _remaining(meter: Meter) -> int:
    return meter.remaining


def _wait_s(refusal: Refusal) -> float:
    return math.inf if refusal.retry_after_s is None else refusal.retry_after_s
