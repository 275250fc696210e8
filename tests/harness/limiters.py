"""Limiters before a ledger that answers from a table: what contract and unit tests of limits and budgets share."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Protocol

from helixflow.core.clock import Clock, FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Demand, Grant, Limiter, Refusal, Settlement
from helixflow.metering.memory_limiter import MemoryLimiter
from helixflow.metering.policies import Budget, Limit, Metric, Period, Policies, Scope, Unit
from helixflow.metering.spend import BudgetPeriod, OpenJournal, SpendView

JOURNAL, NODE = "0" * 24, "node"
ORGANISATION, PROJECT, KEY = "org_1", "proj_1", "key_1"


def limit(metric: Metric, value: int, *, burst: int | None = None, id: str = "", scope: Scope = Scope.KEY) -> Limit:
    """On the key; the burst is the value, or 0 for parallel requests."""
    if burst is None:
        burst = 0 if metric is Metric.PARALLEL_REQUESTS else value
    return Limit(id or f"lim_{metric.name.lower()}", ORGANISATION, scope, KEY, "", metric, value, burst)


def budget(
    cap: int,
    *,
    id: str = "bud_1",
    unit: Unit = Unit.MONEY,
    period: Period = Period.MONTH,
    scope: Scope = Scope.KEY,
) -> Budget:
    subject = {Scope.KEY: KEY, Scope.PROJECT: PROJECT, Scope.ORGANISATION: ORGANISATION}[scope]
    return Budget(id, ORGANISATION, scope, subject, unit, period, cap)


def policies(*items: Limit | Budget) -> Policies:
    return Policies(
        tuple(item for item in items if isinstance(item, Limit)),
        tuple(item for item in items if isinstance(item, Budget)),
    )


class FakeLedger:
    """Implements `SpendReader`: knows what tests have put there, and our journal as far as `position` says.

    `spent` is by the counter of the period, 0 for others. `journals` are the other open ones; ours, if it is there,
    overrides `position`. It has not heard of us before `knows_us`. While closed it hangs, while `away` it says that it
    does not answer.
    """

    def __init__(self, position: Callable[[], int]) -> None:
        self.spent: dict[str, int] = {}
        self.journals: dict[str, OpenJournal] = {}
        self.knows_us = True
        self.away = False
        self.asked: list[Sequence[BudgetPeriod]] = []
        self._position = position
        self._open = asyncio.Event()
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def reopen(self) -> None:
        self._open.set()

    async def read(self, periods: Sequence[BudgetPeriod]) -> SpendView:
        self.asked.append(periods)
        await self._open.wait()
        if self.away:
            raise HelixError(ErrorKind.UNAVAILABLE, "The ledger does not answer.", retry_after_s=1)
        ours = {JOURNAL: OpenJournal(NODE, self._position())} if self.knows_us else {}
        journals = {**ours, **self.journals}
        return SpendView([self.spent.get(period.counter, 0) for period in periods], journals)


class Bench(Protocol):
    """A limiter that runs, and what tests do with it. `position` is where its journal ends; the ledger follows."""

    limiter: Limiter
    ledger: FakeLedger
    clock: Clock
    position: int

    async def pass_time(self, seconds: float) -> None:
        """Lets so much time pass on the limiter's clock."""
        ...

    async def now_us(self) -> int:
        """The limiter's clock."""
        ...


class Caller:
    """Makes calls and ends them, as the gateway does."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._numbers = count(1)

    def demand(
        self,
        applying: Policies,
        *,
        tokens: int = 0,
        tokens_bound: int | None = None,
        cost: int = 0,
        at_ms: int | None = None,
        wait_s: float = 5.0,
    ) -> Demand:
        now_ms = int(self.bench.clock.now() * 1000) if at_ms is None else at_ms
        bound = tokens if tokens_bound is None else tokens_bound
        deadline = asyncio.get_running_loop().time() + wait_s
        call_id = f"{next(self._numbers):032x}"
        return Demand(call_id, ORGANISATION, applying, tokens, bound, cost, now_ms, deadline, PROJECT, KEY)

    async def admit(self, demand: Demand) -> Grant:
        grant = self.bench.limiter.try_admit(demand)
        return grant if grant is not None else await self.bench.limiter.admit(demand)

    async def refused(self, demand: Demand) -> Refusal:
        """Why it was; fails if it was not."""
        try:
            await self.admit(demand)
        except Refusal as refusal:
            return refusal
        raise AssertionError("admitted what should have been refused")

    def settlement(self, demand: Demand, grant: Grant, *, tokens: int = 0, cost: int = 0) -> Settlement:
        self.bench.position += 100
        return Settlement(demand.call_id, ORGANISATION, grant.holds, tokens, cost, self.bench.position)

    def settle(self, demand: Demand, grant: Grant, *, tokens: int = 0, cost: int = 0) -> None:
        self.bench.limiter.settle(self.settlement(demand, grant, tokens=tokens, cost=cost))

    def release(self, demand: Demand, grant: Grant) -> None:
        self.bench.limiter.release([self.settlement(demand, grant)])


class MemoryBench:
    """A `MemoryLimiter` whose clock is moved by tests."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.position = 0
        self.ledger = FakeLedger(lambda: self.position)
        self.limiter = MemoryLimiter(
            self.ledger, self.clock, journal_id=JOURNAL, node_id=NODE, position=lambda: self.position
        )

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def now_us(self) -> int:
        return int(self.clock.monotonic() * 1_000_000)


@asynccontextmanager
async def run_memory_limiter() -> AsyncIterator[MemoryBench]:
    bench = MemoryBench()
    running = asyncio.create_task(bench.limiter.run())
    try:
        yield bench
    finally:
        running.cancel()
        await asyncio.wait([running])
        if not running.cancelled():
            running.result()
        await bench.limiter.close()
