"""What every limiter does, whatever it counts with: `Limiter` in metering/admission.py."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Grant, Refusal
from helixflow.metering.policies import DAY_MS, NO_POLICIES, Metric, Period, Scope, Unit, period_bounds
from tests.harness.limiters import Bench, Caller, budget, limit, policies, run_memory_limiter
from tests.harness.redis_limiters import run_redis_limiter


@pytest.fixture(params=["memory", "redis"])
async def limiter(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if request.param == "memory":
        async with run_memory_limiter() as memory:
            yield memory
    else:
        async with run_redis_limiter(request.getfixturevalue("redis_server")) as redis:
            yield redis


@pytest.fixture
def caller(limiter: Bench) -> Caller:
    return Caller(limiter)


async def test_a_call_without_policies_takes_nothing(limiter: Bench, caller: Caller) -> None:
    demand = caller.demand(NO_POLICIES, tokens=10**9, cost=10**15)
    assert limiter.limiter.try_admit(demand) in (None, Grant())
    assert (await caller.admit(demand)) == Grant()


class TestRates:
    async def test_a_burst_is_admitted_and_then_one_a_time(self, limiter: Bench, caller: Caller) -> None:
        # One a second, so that nothing refills between two calls.
        applying = policies(limit(Metric.REQUESTS_PER_MINUTE, 60, burst=3))
        for left in (2, 1, 0):
            demand = caller.demand(applying)
            grant = await caller.admit(demand)
            assert grant.holds == (("l:lim_requests_per_minute", 1),)
            assert grant.requests is not None
            assert (grant.requests.limit, grant.requests.remaining) == (60, left)
            assert grant.requests.reset_s == pytest.approx(3 - left, abs=0.75)
            caller.settle(demand, grant)
        refusal = await caller.refused(caller.demand(applying))
        assert refusal.limit == applying.limits[0]
        assert refusal.budget is None
        assert refusal.requests is not None
        assert refusal.requests.remaining == 0
        assert refusal.retry_after_s == pytest.approx(1, abs=0.75)
        assert not refusal.too_large
        # The wait is honest: long enough, and not for more than it takes.
        await limiter.pass_time(refusal.retry_after_s)
        await caller.admit(caller.demand(applying))
        await caller.refused(caller.demand(applying))

    async def test_nobody_gets_more_than_burst_and_rate_and_who_never_stops_gets_all(
        self, limiter: Bench, caller: Caller
    ) -> None:
        # A burst of two seconds: were nobody to ask for longer, some of it would be lost.
        value, burst = 6_000, 200
        applying = policies(limit(Metric.REQUESTS_PER_MINUTE, value, burst=burst))
        began = await limiter.now_us()
        await caller.admit(caller.demand(applying))
        first_us, admitted, refused = await limiter.now_us(), 1, 0
        while refused < 100:
            asked_us = await limiter.now_us()
            try:
                await caller.admit(caller.demand(applying))
                admitted += 1
            except Refusal as refusal:
                refused += 1
                assert admitted >= burst + (asked_us - first_us) * value // 60_000_000
                assert admitted <= burst + (await limiter.now_us() - began) * value // 60_000_000
                assert refusal.retry_after_s is not None
                await limiter.pass_time(refusal.retry_after_s / 3)

    async def test_what_was_not_used_comes_back_and_what_was_overdrawn_is_owed(
        self, limiter: Bench, caller: Caller
    ) -> None:
        # A token an hour: time plays no part.
        applying = policies(limit(Metric.TOKENS_PER_DAY, 24, burst=1000))
        first = caller.demand(applying, tokens=900)
        grant = await caller.admit(first)
        assert grant.tokens is not None
        assert grant.tokens.remaining == 100
        assert grant.requests is None
        caller.settle(first, grant, tokens=300)
        second = caller.demand(applying, tokens=700)
        grant = await caller.admit(second)
        caller.settle(second, grant, tokens=760)
        refusal = await caller.refused(caller.demand(applying, tokens=1))
        assert refusal.tokens is not None
        assert refusal.tokens.remaining == 0
        # 60 are owed, and the one that is asked for.
        assert refusal.retry_after_s == pytest.approx(61 * 3600, abs=1)

    async def test_a_call_that_never_fits_is_not_told_to_wait(self, caller: Caller) -> None:
        applying = policies(limit(Metric.TOKENS_PER_MINUTE, 1000))
        refusal = await caller.refused(caller.demand(applying, tokens=1001))
        assert refusal.too_large
        assert refusal.retry_after_s is None
        assert refusal.requested == 1001
        grant = await caller.admit(caller.demand(applying, tokens=1000))
        assert grant.tokens is not None

    async def test_a_refused_call_has_taken_nothing(self, caller: Caller) -> None:
        few = limit(Metric.REQUESTS_PER_MINUTE, 1, burst=5)
        parallel = limit(Metric.PARALLEL_REQUESTS, 2)
        tokens = limit(Metric.TOKENS_PER_DAY, 1000)
        purse = budget(1000)
        for _ in range(3):
            refusal = await caller.refused(caller.demand(policies(few, parallel, tokens, purse), tokens=1, cost=1001))
            assert refusal.budget == purse
        for _ in range(3):
            await caller.refused(caller.demand(policies(few, parallel, tokens, purse), tokens=1001, cost=1))
        grant = await caller.admit(caller.demand(policies(few, parallel, tokens, purse), tokens=1000, cost=1000))
        assert grant.requests is not None
        assert grant.requests.remaining == 4
        await caller.admit(caller.demand(policies(parallel)))

    async def test_the_tightest_of_each_kind_is_told(self, caller: Caller) -> None:
        wide = limit(Metric.REQUESTS_PER_MINUTE, 100, id="wide", scope=Scope.ORGANISATION)
        tight = limit(Metric.REQUESTS_PER_MINUTE, 10, id="tight")
        day = limit(Metric.TOKENS_PER_DAY, 500, id="day")
        minute = limit(Metric.TOKENS_PER_MINUTE, 5000, id="minute")
        grant = await caller.admit(caller.demand(policies(wide, tight, day, minute), tokens=100))
        assert grant.requests is not None
        assert grant.tokens is not None
        assert (grant.requests.limit, grant.requests.remaining) == (10, 9)
        assert (grant.tokens.limit, grant.tokens.remaining) == (500, 400)
        refusal = await caller.refused(caller.demand(policies(wide, tight, day, minute), tokens=401))
        assert refusal.limit == day
        assert refusal.requests is not None
        assert refusal.tokens is not None
        assert (refusal.requests.remaining, refusal.tokens.remaining) == (9, 400)

    async def test_a_call_that_was_never_made_gives_all_back(self, caller: Caller) -> None:
        applying = policies(
            limit(Metric.REQUESTS_PER_MINUTE, 1),
            limit(Metric.TOKENS_PER_DAY, 100),
            limit(Metric.PARALLEL_REQUESTS, 1),
            budget(100),
        )
        for _ in range(3):
            demand = caller.demand(applying, tokens=100, cost=100)
            caller.release(demand, await caller.admit(demand))

    async def test_a_changed_limit_holds_from_the_next_call_on(self, caller: Caller) -> None:
        await caller.admit(caller.demand(policies(limit(Metric.TOKENS_PER_DAY, 100)), tokens=80))
        more = policies(limit(Metric.TOKENS_PER_DAY, 300))
        grant = await caller.admit(caller.demand(more, tokens=100))
        assert grant.tokens is not None
        assert grant.tokens.remaining == 120
        less = policies(limit(Metric.TOKENS_PER_DAY, 150))
        assert (await caller.refused(caller.demand(less, tokens=1))).limit == less.limits[0]


class TestParallelRequests:
    async def test_places_are_held_until_calls_end(self, caller: Caller) -> None:
        applying = policies(limit(Metric.PARALLEL_REQUESTS, 2))
        first, second = caller.demand(applying), caller.demand(applying)
        held = await caller.admit(first)
        assert held.holds == (("l:lim_parallel_requests", 1),)
        assert (held.requests, held.tokens) == (None, None)
        await caller.admit(second)
        refusal = await caller.refused(caller.demand(applying))
        assert refusal.limit == applying.limits[0]
        assert refusal.retry_after_s == 1
        caller.settle(first, held, tokens=5)
        third = caller.demand(applying)
        grant = await caller.admit(third)
        await caller.refused(caller.demand(applying))
        caller.release(third, grant)
        await caller.admit(caller.demand(applying))

    async def test_a_call_that_is_settled_twice_counts_once(self, caller: Caller) -> None:
        applying = policies(limit(Metric.PARALLEL_REQUESTS, 1), budget(100))
        demand = caller.demand(applying, cost=50)
        grant = await caller.admit(demand)
        settlement = caller.settlement(demand, grant, cost=30)
        for _ in range(3):
            caller.bench.limiter.settle(settlement)
        other = caller.demand(applying, cost=70)
        await caller.admit(other)
        caller.bench.limiter.settle(settlement)
        assert (await caller.refused(caller.demand(applying, cost=1))).limit == applying.limits[0]


class TestBudgets:
    async def test_the_worst_case_is_reserved_and_the_real_cost_spent(self, caller: Caller) -> None:
        applying = policies(budget(100))
        first, second = caller.demand(applying, cost=60), caller.demand(applying, cost=40)
        held = await caller.admit(first)
        assert held.holds == ((f"b:bud_1:{_month(caller)[0]}", 60),)
        await caller.admit(second)
        # All is reserved: what runs may well use less.
        refusal = await caller.refused(caller.demand(applying, cost=1))
        assert refusal.budget == applying.budgets[0]
        assert refusal.limit is None
        assert refusal.retry_after_s == 1
        caller.settle(first, held, cost=10)
        await caller.admit(caller.demand(applying, cost=50))
        await caller.refused(caller.demand(applying, cost=1))

    async def test_all_budgets_must_have_room(self, caller: Caller) -> None:
        own, shared = budget(100, id="own"), budget(150, id="shared", scope=Scope.ORGANISATION)
        tokens = budget(1000, id="tokens", unit=Unit.TOKENS, scope=Scope.PROJECT)
        await caller.admit(caller.demand(policies(own, shared, tokens), cost=90, tokens_bound=400))
        assert (await caller.refused(caller.demand(policies(own, shared, tokens), cost=20))).budget == own
        assert (await caller.refused(caller.demand(policies(shared, tokens), cost=70))).budget == shared
        refusal = await caller.refused(caller.demand(policies(shared, tokens), cost=1, tokens_bound=601))
        assert refusal.budget == tokens
        await caller.admit(caller.demand(policies(shared, tokens), cost=60, tokens_bound=600))
        await caller.admit(caller.demand(policies(own), cost=10))

    async def test_tokens_are_settled_as_they_were_used(self, caller: Caller) -> None:
        applying = policies(budget(1000, unit=Unit.TOKENS))
        demand = caller.demand(applying, tokens=10, tokens_bound=900, cost=10**12)
        grant = await caller.admit(demand)
        caller.settle(demand, grant, tokens=100, cost=10**12)
        await caller.admit(caller.demand(applying, tokens_bound=900))
        await caller.refused(caller.demand(applying, tokens_bound=1))

    async def test_it_goes_on_from_what_the_ledger_has(self, limiter: Bench, caller: Caller) -> None:
        applying = policies(budget(100))
        limiter.ledger.spent[f"b:bud_1:{_month(caller)[0]}"] = 70
        await caller.refused(caller.demand(applying, cost=31))
        await caller.admit(caller.demand(applying, cost=30))

    async def test_once_all_is_spent_nothing_is_free(self, limiter: Bench, caller: Caller) -> None:
        applying = policies(budget(100))
        limiter.ledger.spent[f"b:bud_1:{_month(caller)[0]}"] = 100
        refusal = await caller.refused(caller.demand(applying, cost=0))
        # Until the month ends.
        assert refusal.retry_after_s == pytest.approx(_month(caller)[1] / 1000 - caller.bench.clock.now(), abs=5)
        assert not refusal.too_large

    async def test_a_total_does_not_end(self, limiter: Bench, caller: Caller) -> None:
        applying = policies(budget(100, period=Period.TOTAL))
        limiter.ledger.spent["b:bud_1:0"] = 60
        refusal = await caller.refused(caller.demand(applying, cost=50))
        assert refusal.retry_after_s is None
        assert not refusal.too_large

    async def test_a_call_dearer_than_the_whole_budget_is_too_large(self, caller: Caller) -> None:
        refusal = await caller.refused(caller.demand(policies(budget(100)), cost=101))
        assert refusal.too_large
        assert refusal.retry_after_s is None
        assert refusal.requested == 101

    async def test_a_call_is_charged_to_the_period_that_it_was_admitted_in(self, caller: Caller) -> None:
        applying = policies(budget(100, period=Period.DAY))
        today = int(caller.bench.clock.now() * 1000)
        late = caller.demand(applying, cost=80, at_ms=today - DAY_MS)
        grant = await caller.admit(late)
        assert grant.holds[0][0].endswith(str((today // DAY_MS - 1) * DAY_MS))
        demand = caller.demand(applying, cost=100, at_ms=today)
        caller.release(demand, await caller.admit(demand))
        caller.settle(late, grant, cost=70)
        await caller.admit(caller.demand(applying, cost=100, at_ms=today))
        await caller.refused(caller.demand(applying, cost=31, at_ms=today - DAY_MS))
        await caller.admit(caller.demand(applying, cost=30, at_ms=today - DAY_MS))

    async def test_the_cap_is_the_one_that_the_call_was_given(self, caller: Caller) -> None:
        await caller.admit(caller.demand(policies(budget(100)), cost=90))
        await caller.admit(caller.demand(policies(budget(200)), cost=110))
        refusal = await caller.refused(caller.demand(policies(budget(150)), cost=1))
        assert refusal.budget == budget(150)

    async def test_a_cost_above_what_was_reserved_is_charged_in_full(self, caller: Caller) -> None:
        applying = policies(budget(100))
        demand = caller.demand(applying, cost=10)
        grant = await caller.admit(demand)
        caller.settle(demand, grant, cost=95)
        await caller.refused(caller.demand(applying, cost=6))
        await caller.admit(caller.demand(applying, cost=5))

    async def test_many_at_once_never_go_over(self, limiter: Bench, caller: Caller) -> None:
        applying = policies(budget(1000), budget(700, id="bud_2", scope=Scope.PROJECT))
        spent = 0
        # What is being asked of the ledger is asked for once, whoever waits for it.
        limiter.ledger.close()

        async def call(number: int) -> None:
            nonlocal spent
            demand = caller.demand(applying, cost=20)
            try:
                grant = await caller.admit(demand)
            except Refusal:
                return
            spent += number % 20
            await asyncio.sleep(0)
            caller.settle(demand, grant, cost=number % 20)

        async with asyncio.TaskGroup() as calls:
            for number in range(150):
                calls.create_task(call(number))
            await asyncio.sleep(0)
            limiter.ledger.reopen()
        for number in range(150):
            await call(number)
        # Who is refused in the end finds less room than a call may need, and no reservation is left behind.
        assert 680 < spent <= 700
        await caller.admit(caller.demand(applying, cost=700 - spent))
        assert (await caller.refused(caller.demand(applying, cost=1))).budget == applying.budgets[1]

    async def test_without_a_ledger_only_what_is_known_is_given(self, limiter: Bench, caller: Caller) -> None:
        known, unknown = policies(budget(100)), policies(budget(100, id="bud_2"), limit(Metric.PARALLEL_REQUESTS, 1))
        await caller.admit(caller.demand(known, cost=40))
        limiter.ledger.away = True
        await caller.admit(caller.demand(known, cost=60))
        await caller.refused(caller.demand(known, cost=1))
        with pytest.raises(HelixError) as failure:
            await caller.admit(caller.demand(unknown, cost=1, wait_s=0.15))
        assert failure.value.kind is ErrorKind.UNAVAILABLE
        assert failure.value.retry_after_s == 1
        # It has taken no place either, and works once the ledger is back.
        limiter.ledger.away = False
        await caller.admit(caller.demand(unknown, cost=1))

    async def test_a_call_may_be_given_up_while_it_waits(self, limiter: Bench, caller: Caller) -> None:
        applying = policies(budget(100), limit(Metric.PARALLEL_REQUESTS, 1))
        limiter.ledger.close()
        waiting = [asyncio.create_task(caller.admit(caller.demand(applying, cost=60))) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        await asyncio.wait(waiting[:2])
        limiter.ledger.reopen()
        assert len((await waiting[2]).holds) == 2
        # Those that went away hold nothing.
        await caller.admit(caller.demand(policies(applying.budgets[0]), cost=40))


def _month(caller: Caller) -> tuple[int, int]:
    return period_bounds(Period.MONTH, int(caller.bench.clock.now() * 1000) // DAY_MS)
