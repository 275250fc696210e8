"""Budgets in memory beside a model that keeps every call, whatever the ledger knows and when it is asked."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helixflow.core.clock import FakeClock
from helixflow.metering.admission import Demand, Grant, Refusal, Settlement
from helixflow.metering.memory_limiter import MemoryLimiter
from helixflow.metering.policies import DAY_MS, Budget, Metric, Period, Policies, Scope, Unit, period_bounds
from helixflow.metering.spend import BudgetPeriod, OpenJournal, SpendView
from tests.harness.limiters import JOURNAL, KEY, NODE, ORGANISATION, PROJECT, budget, limit
from tests.harness.virtual_time import VirtualTimeLoop

PARALLEL = limit(Metric.PARALLEL_REQUESTS, 3)
BUDGETS = (
    budget(300, id="day", period=Period.DAY),
    budget(500, id="month", scope=Scope.PROJECT),
    budget(400, id="total", period=Period.TOTAL, scope=Scope.ORGANISATION),
    budget(2000, id="tokens", period=Period.DAY, unit=Unit.TOKENS, scope=Scope.ORGANISATION),
)
# A day's last hours and the next one's first are near.
START = 1_700_000_000.0


@dataclass(eq=False)
class Running:
    demand: Demand
    grant: Grant
    limited: bool
    budgets: tuple[Budget, ...]


@dataclass(frozen=True)
class Row:
    """A call that has ended, at a position of the journal."""

    position: int
    at_ms: int
    tokens: int
    cost: int


class BudgetMachine(RuleBasedStateMachine):
    """Its ledger gets the journal when the machine feels like it; calls end, and are settled, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock(START)
        self.loop = VirtualTimeLoop()
        self.position = self.shipped = 0
        self.predecessor = False
        self.limiter = MemoryLimiter(self, self.clock, journal_id=JOURNAL, node_id=NODE, position=lambda: self.position)
        self.loading = self.loop.create_task(self.limiter.run())
        self.made: list[Budget] = [BUDGETS[0]]
        self.running: list[Running] = []
        # In the journal, and those of them that the limiter has not been told of.
        self.rows: list[Row] = []
        self.untold: list[Settlement] = []
        self.calls = 0

    def teardown(self) -> None:
        try:
            while self.running:
                self.end(0, 1.0, True)
            self.tell_all()
            self.let_time_pass(8.0)
            self.has_just_the_room_that_is_left()
            assert self.limiter.figures.in_flight == 0
        finally:
            self.loading.cancel()
            self.loop.run_until_complete(asyncio.wait([self.loading]))
            self.loop.close()

    async def read(self, periods: Sequence[BudgetPeriod]) -> SpendView:
        known = [row for row in self.rows if row.position <= self.shipped and (row.position or not self.predecessor)]
        journals = {JOURNAL: OpenJournal(NODE, self.shipped), "other": OpenJournal("another node", 5)}
        if self.predecessor:
            journals["dead"] = OpenJournal(NODE, 7)
        return SpendView([_spent(known, period.budget, period.from_ms) for period in periods], journals)

    @rule(index=st.integers(0, len(BUDGETS) - 1))
    def make_budget(self, index: int) -> None:
        if BUDGETS[index] not in self.made:
            self.made.append(BUDGETS[index])

    @rule(bound=st.integers(0, 200), tokens=st.integers(0, 900), stale=st.booleans(), limited=st.booleans())
    def admit(self, bound: int, tokens: int, stale: bool, limited: bool) -> None:
        """`stale`: whoever resolved the policies has not heard of the newest budget."""
        applying = tuple(self.made[:-1] if stale else self.made)
        demand = self.demand(Policies((PARALLEL,) if limited else (), applying), tokens, bound)
        fits = all(self.room(each, demand.admitted_at_ms, bound, tokens) for each in applying)
        fits = fits and not (limited and sum(call.limited for call in self.running) >= PARALLEL.value)
        try:
            grant = self.limiter.try_admit(demand)
        except Refusal:
            assert not fits or self.untold
            return
        if grant is None:
            # A budget is not known yet; this call gives up, a later one may find it loaded.
            waiting = self.loop.create_task(self.limiter.admit(demand))
            self.loop.run_until_complete(asyncio.wait([waiting], timeout=0))
            if waiting.cancel():
                self.loop.run_until_complete(asyncio.wait([waiting]))
                return
            if isinstance(waiting.exception(), Refusal):
                assert not fits or self.untold
                return
            grant = waiting.result()
        assert fits or self.untold
        self.running.append(Running(demand, grant, limited, applying))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), part=st.floats(0, 1.2), told=st.booleans())
    def end(self, which: int, part: float, told: bool) -> None:
        """Written to the journal; the limiter is told at once, or later as where it must be on the disk first."""
        call = self.running.pop(which % len(self.running))
        demand = call.demand
        tokens, cost = int(demand.tokens_bound * part), int(demand.cost_bound * part)
        self.position += 100
        self.rows.append(Row(self.position, demand.admitted_at_ms, tokens, cost))
        self.untold.append(Settlement(demand.call_id, ORGANISATION, call.grant.holds, tokens, cost, self.position))
        if told:
            self.limiter.settle(self.untold.pop())

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        call = self.running.pop(which % len(self.running))
        self.limiter.release([Settlement(call.demand.call_id, ORGANISATION, call.grant.holds, 0, 0, 0)])

    @rule()
    def tell_all(self) -> None:
        for settlement in reversed(self.untold):
            self.limiter.settle(settlement)
        self.untold.clear()

    @rule(part=st.floats(0, 1))
    def ship(self, part: float) -> None:
        self.shipped += int((self.position - self.shipped) * part / 100) * 100

    @rule()
    def ship_all(self) -> None:
        self.shipped = self.position

    @initialize(costs=st.lists(st.integers(0, 100), max_size=2))
    def begin_after_one_that_was_killed(self, costs: list[int]) -> None:
        """What it has left is not in the ledger before its journal is closed."""
        self.rows = [Row(0, int(START * 1000), cost, cost) for cost in costs]
        self.predecessor = bool(costs)

    @rule()
    def close_the_predecessor(self) -> None:
        self.predecessor = False

    @rule(hours=st.sampled_from([0.001, 1.8, 12.0, 24.0]))
    def let_time_pass(self, hours: float) -> None:
        self.clock.advance(hours * 3600)
        self.loop.run_until_complete(asyncio.sleep(11))

    @rule(seconds=st.sampled_from([0.01, 0.1, 2.0]))
    def let_the_loop_run(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    @invariant()
    def has_just_the_room_that_is_left(self) -> None:
        """As asked one budget at a time, unless it is not known yet."""
        if self.untold:
            return
        at_ms = int(self.clock.now() * 1000)
        for each in self.made:
            left = each.cap - self.spent(each, at_ms) - self.reserved(each, at_ms)
            for amount in (max(left, 0), max(left, 0) + 1):
                demand = self.demand(Policies((), (each,)), amount, amount)
                try:
                    grant = self.limiter.try_admit(demand)
                except Refusal:
                    assert not self.room(each, at_ms, amount, amount)
                else:
                    if grant is not None:
                        assert self.room(each, at_ms, amount, amount)
                        self.limiter.release([Settlement(demand.call_id, ORGANISATION, grant.holds, 0, 0, 0)])

    def demand(self, applying: Policies, tokens: int, bound: int) -> Demand:
        self.calls += 1
        at_ms = int(self.clock.now() * 1000)
        return Demand(str(self.calls), ORGANISATION, applying, 0, tokens, bound, at_ms, 1e9, PROJECT, KEY)

    def room(self, each: Budget, at_ms: int, cost: int, tokens: int) -> bool:
        spent = self.spent(each, at_ms)
        amount = cost if each.unit is Unit.MONEY else tokens
        return spent < each.cap and spent + self.reserved(each, at_ms) + amount <= each.cap

    def spent(self, each: Budget, at_ms: int) -> int:
        return _spent(self.rows, each, period_bounds(each.period, at_ms // DAY_MS)[0])

    def reserved(self, each: Budget, at_ms: int) -> int:
        begins = period_bounds(each.period, at_ms // DAY_MS)[0]
        return sum(
            call.demand.cost_bound if each.unit is Unit.MONEY else call.demand.tokens_bound
            for call in self.running
            if each in call.budgets and period_bounds(each.period, call.demand.admitted_at_ms // DAY_MS)[0] == begins
        )


def _spent(rows: Sequence[Row], each: Budget, begins: int) -> int:
    return sum(
        row.cost if each.unit is Unit.MONEY else row.tokens
        for row in rows
        if period_bounds(each.period, row.at_ms // DAY_MS)[0] == begins
    )


TestBudgets = BudgetMachine.TestCase
TestBudgets.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
