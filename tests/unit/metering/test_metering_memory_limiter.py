"""What only the limiter in memory does; the rest is in tests/contract/test_limiters.py."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from helixflow.metering.policies import NO_POLICIES, Metric, Period, Unit
from tests.harness.limiters import Caller, MemoryBench, budget, limit, policies, run_memory_limiter


@pytest.fixture
async def bench() -> AsyncIterator[MemoryBench]:
    async with run_memory_limiter() as bench:
        yield bench


@pytest.fixture
def caller(bench: MemoryBench) -> Caller:
    return Caller(bench)


async def test_nothing_is_awaited_unless_a_budget_is_not_known_yet(bench: MemoryBench, caller: Caller) -> None:
    applying = policies(limit(Metric.REQUESTS_PER_MINUTE, 60), limit(Metric.TOKENS_PER_MINUTE, 1000), budget(100))
    assert bench.limiter.try_admit(caller.demand(applying, tokens=10, cost=1)) is None
    grant = await bench.limiter.admit(caller.demand(applying, tokens=10, cost=1))
    # The one that was not decided has taken nothing.
    assert grant.requests is not None
    assert grant.requests.remaining == 59
    assert bench.limiter.try_admit(caller.demand(applying, tokens=10, cost=1)) is not None


async def test_waits_are_right_to_the_microsecond(bench: MemoryBench, caller: Caller) -> None:
    applying = policies(limit(Metric.REQUESTS_PER_MINUTE, 7, burst=1))
    await caller.admit(caller.demand(applying))
    refusal = await caller.refused(caller.demand(applying))
    assert refusal.retry_after_s == pytest.approx(60 / 7, abs=1e-6)
    bench.clock.advance(60 / 7 - 1e-5)
    await caller.refused(caller.demand(applying))
    bench.clock.advance(1.2e-5)
    await caller.admit(caller.demand(applying))


async def test_the_longest_wait_is_told(bench: MemoryBench, caller: Caller) -> None:
    minute = limit(Metric.REQUESTS_PER_MINUTE, 60, burst=1)
    day = limit(Metric.TOKENS_PER_DAY, 24, burst=10)
    purse = budget(100, period=Period.DAY)
    await caller.admit(caller.demand(policies(minute, day, purse), tokens=10, cost=100))
    assert (await caller.refused(caller.demand(policies(minute, day), tokens=1))).limit == day
    assert (await caller.refused(caller.demand(policies(minute), tokens=1))).limit == minute
    # Nothing that waiting helps: that comes before all.
    large = await caller.refused(caller.demand(policies(minute, day, purse), tokens=11, cost=1))
    assert large.limit == day
    assert large.too_large


async def test_limits_that_are_full_again_are_forgotten(bench: MemoryBench, caller: Caller) -> None:
    minute, parallel = limit(Metric.TOKENS_PER_MINUTE, 100), limit(Metric.PARALLEL_REQUESTS, 1)
    first, second = caller.demand(policies(minute), tokens=50), caller.demand(policies(parallel))
    grants = [await caller.admit(each) for each in (first, second)]
    bench.clock.advance(1000)
    await bench.limiter.tidy()
    # Both are held by calls that run: a long one may owe more than it said.
    assert bench.limiter.figures.limits == 2
    caller.settle(first, grants[0], tokens=190)
    caller.settle(second, grants[1])
    await bench.limiter.tidy()
    assert bench.limiter.figures.limits == 1
    assert (await caller.refused(caller.demand(policies(minute), tokens=1))).limit == minute
    # Full after 84 seconds, and forgotten a window later.
    bench.clock.advance(140)
    await bench.limiter.tidy()
    assert bench.limiter.figures.limits == 1
    bench.clock.advance(5)
    await bench.limiter.tidy()
    assert bench.limiter.figures.limits == 0
    assert bench.limiter.figures.in_flight == 0


async def test_calls_that_use_more_than_they_said_are_counted(bench: MemoryBench, caller: Caller) -> None:
    for applying, tokens, cost in (
        (policies(budget(1000)), 10, 11),
        (policies(budget(1000)), 11, 10),
        (policies(budget(1000)), 10, 10),
        (policies(limit(Metric.TOKENS_PER_DAY, 100)), 99, 99),
        (NO_POLICIES, 99, 99),
    ):
        demand = caller.demand(applying, tokens=1, tokens_bound=10, cost=10)
        caller.settle(demand, await caller.admit(demand), tokens=tokens, cost=cost)
    assert bench.limiter.figures.overruns == 2
    # Two of them had budgets, and they are charged in full; the others count as well, since they are of the same key.
    await caller.refused(caller.demand(policies(budget(1000)), cost=1000 - 229 + 1))
    await caller.admit(caller.demand(policies(budget(1000)), cost=1000 - 229))


async def test_nonsense_that_an_engine_reports_neither_fails_nor_gives_anything(
    bench: MemoryBench, caller: Caller
) -> None:
    applying = policies(
        limit(Metric.TOKENS_PER_DAY, 100), budget(100), budget(100, id="bud_2", unit=Unit.TOKENS, period=Period.TOTAL)
    )
    demand = caller.demand(applying, tokens=10, tokens_bound=10, cost=10)
    caller.settle(demand, await caller.admit(demand), tokens=-(10**30), cost=-(10**30))
    without = caller.demand(NO_POLICIES)
    caller.settle(without, await caller.admit(without), tokens=-(10**30), cost=-(10**30))
    demand = caller.demand(applying, tokens=100, tokens_bound=100, cost=100)
    grant = await caller.admit(demand)
    assert grant.tokens is not None and grant.tokens.remaining == 0
    caller.settle(demand, grant, tokens=10**400, cost=10**400)
    # What it may be is not known; it is dear, and headers can still be made of it.
    refusal = await caller.refused(caller.demand(applying, tokens=1, tokens_bound=1, cost=1))
    assert refusal.tokens is not None and 0 < refusal.tokens.reset_s < 10**13
    assert bench.limiter.figures.in_flight == 0


async def test_who_has_an_older_limit_and_who_has_the_new_one_are_each_held_to_theirs(caller: Caller) -> None:
    """For the moment in which a change is on its way; both count the same calls."""
    older, newer = policies(limit(Metric.TOKENS_PER_DAY, 100)), policies(limit(Metric.TOKENS_PER_DAY, 10))
    await caller.admit(caller.demand(older, tokens=5))
    await caller.refused(caller.demand(newer, tokens=6))
    await caller.admit(caller.demand(older, tokens=20))
    await caller.refused(caller.demand(newer, tokens=1))
    assert (await caller.refused(caller.demand(older, tokens=76))).retry_after_s is not None
    await caller.admit(caller.demand(older, tokens=75))


async def test_a_limit_that_was_forgotten_is_counted_in_one_place_again(bench: MemoryBench, caller: Caller) -> None:
    """Callers with equal policies of their own, as they have from different answers."""
    one, other = policies(limit(Metric.TOKENS_PER_MINUTE, 100)), policies(limit(Metric.TOKENS_PER_MINUTE, 100))
    demand = caller.demand(one, tokens=10)
    caller.settle(demand, await caller.admit(demand), tokens=10)
    bench.clock.advance(1000)
    await bench.limiter.tidy()
    assert bench.limiter.figures.limits == 0
    await caller.admit(caller.demand(other, tokens=100))
    await caller.refused(caller.demand(one, tokens=1))


async def test_a_call_between_two_looks_at_many_limits_counts_where_all_count(
    bench: MemoryBench, caller: Caller
) -> None:
    many = [policies(limit(Metric.TOKENS_PER_MINUTE, 100, id=f"lim_{number}")) for number in range(1500)]
    for applying in many:
        demand = caller.demand(applying, tokens=1)
        caller.settle(demand, await caller.admit(demand), tokens=1)
    bench.clock.advance(1000)
    tidying = asyncio.create_task(bench.limiter.tidy())
    await asyncio.sleep(0)
    # The first thousand are forgotten. This one is not yet: it is looked up, and refused, so that it stays idle.
    last = many[-1]
    await caller.refused(caller.demand(last, tokens=101))
    await tidying
    assert bench.limiter.figures.limits == 0
    await caller.admit(caller.demand(policies(*last.limits), tokens=100))
    await caller.refused(caller.demand(last, tokens=1))
