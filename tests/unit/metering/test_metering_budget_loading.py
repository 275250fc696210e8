"""Where budgets begin to count: no call is missed, and none counted twice, whenever the ledger learns of it."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Demand, Refusal, Settlement
from helixflow.metering.policies import DAY_MS, NO_POLICIES, Metric, Period, Policies, Scope, period_bounds
from helixflow.metering.spend import OpenJournal
from tests.harness.limiters import (
    JOURNAL,
    KEY,
    NODE,
    ORGANISATION,
    Caller,
    MemoryBench,
    budget,
    limit,
    policies,
    run_memory_limiter,
)
from tests.harness.virtual_time import VirtualTimeLoop

MONEY = policies(budget(100))


@pytest.fixture
async def bench() -> AsyncIterator[MemoryBench]:
    async with run_memory_limiter() as bench:
        yield bench


@pytest.fixture
def caller(bench: MemoryBench) -> Caller:
    return Caller(bench)


def _counter(caller: Caller) -> str:
    return f"b:bud_1:{period_bounds(Period.MONTH, int(caller.bench.clock.now() * 1000) // DAY_MS)[0]}"


async def _room(caller: Caller, applying: Policies = MONEY) -> int:
    """What a call may cost at most now."""
    for cost in range(100, -1, -1):
        demand = caller.demand(applying, cost=cost)
        try:
            grant = await caller.admit(demand)
        except Refusal:
            continue
        caller.bench.limiter.release([Settlement(demand.call_id, ORGANISATION, grant.holds, 0, 0, 0)])
        return cost
    return -1


async def _until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not reached():
            await asyncio.sleep(0)


class Loading:
    """A call that waits for the budget while the ledger is held back: the answer comes with `finish`."""

    def __init__(self, bench: MemoryBench, caller: Caller) -> None:
        self.bench, self.caller = bench, caller

    async def begin(self) -> None:
        self.bench.ledger.close()
        self.waiting = asyncio.create_task(_room(self.caller))
        await _until(lambda: bool(self.bench.ledger.asked))

    async def finish(self, spent: int, position: int) -> int:
        """What the budget has room for once the ledger has said so."""
        self.bench.ledger.spent[_counter(self.caller)] = spent
        self.bench.ledger.journals[JOURNAL] = OpenJournal(NODE, position)
        self.bench.ledger.reopen()
        return await self.waiting


async def _run_without(caller: Caller) -> tuple[Demand, Settlement]:
    """A call that was admitted before the budget was made, and its end at 30."""
    demand = caller.demand(NO_POLICIES, cost=40)
    return demand, caller.settlement(demand, await caller.admit(demand), cost=30)


async def test_our_own_journal_must_be_in_the_ledger_as_far_as_it_was(bench: MemoryBench, caller: Caller) -> None:
    bench.position = 500
    bench.ledger.journals[JOURNAL] = OpenJournal(NODE, 499)
    with pytest.raises(HelixError):
        await caller.admit(caller.demand(MONEY, cost=1, wait_s=0.2))
    # What is written later need not be there.
    bench.position = 900
    bench.ledger.journals[JOURNAL] = OpenJournal(NODE, 500)
    assert await _room(caller) == 100


async def test_nothing_is_known_before_the_ledger_has_heard_of_our_journal(bench: MemoryBench, caller: Caller) -> None:
    bench.ledger.knows_us = False
    with pytest.raises(HelixError):
        await caller.admit(caller.demand(MONEY, cost=1, wait_s=0.2))
    bench.ledger.knows_us = True
    assert await _room(caller) == 100


async def test_what_a_killed_gateway_of_this_node_has_left_comes_first(bench: MemoryBench, caller: Caller) -> None:
    bench.ledger.journals |= {"dead": OpenJournal(NODE, 10), "far": OpenJournal("another node", 10)}
    with pytest.raises(HelixError) as failure:
        await caller.admit(caller.demand(MONEY, cost=1, wait_s=0.2))
    assert failure.value.kind is ErrorKind.UNAVAILABLE
    assert failure.value.retry_after_s == 1
    assert bench.limiter.figures.unknown == 1
    bench.ledger.spent[_counter(caller)] = 60
    del bench.ledger.journals["dead"]
    assert await _room(caller) == 40


async def test_a_call_that_ends_while_the_ledger_is_asked_counts_if_it_is_not_in_the_answer(
    bench: MemoryBench, caller: Caller
) -> None:
    _, ended = await _run_without(caller)
    loading = Loading(bench, caller)
    await loading.begin()
    bench.position += 100
    bench.limiter.settle(Settlement(ended.call_id, ORGANISATION, (), 0, 30, bench.position))
    assert await loading.finish(spent=5, position=bench.position - 1) == 65


async def test_a_call_that_ends_while_the_ledger_is_asked_counts_once_if_it_is_in_the_answer(
    bench: MemoryBench, caller: Caller
) -> None:
    _, ended = await _run_without(caller)
    loading = Loading(bench, caller)
    await loading.begin()
    bench.position += 100
    bench.limiter.settle(Settlement(ended.call_id, ORGANISATION, (), 0, 30, bench.position))
    assert await loading.finish(spent=35, position=bench.position) == 65


async def test_a_call_that_ends_after_the_budget_was_made_counts(bench: MemoryBench, caller: Caller) -> None:
    demand = caller.demand(policies(limit(Metric.PARALLEL_REQUESTS, 9)))
    grant = await caller.admit(demand)
    assert await _room(caller) == 100
    caller.settle(demand, grant, cost=30)
    assert await _room(caller) == 70


async def test_a_call_whose_end_was_in_the_answer_already_does_not_count_again(
    bench: MemoryBench, caller: Caller
) -> None:
    """Its record had to be on the disk before the limiter was told."""
    _, ended = await _run_without(caller)
    bench.ledger.spent[_counter(caller)] = 30
    assert await _room(caller) == 70
    bench.limiter.settle(ended)
    assert await _room(caller) == 70


async def test_only_budgets_that_apply_count_a_call(bench: MemoryBench, caller: Caller) -> None:
    kinds = (Scope.KEY, Scope.PROJECT, Scope.ORGANISATION)
    budgets = [budget(100, id=f"bud_{scope.value}", scope=scope) for scope in kinds]
    strangers = []
    for index, name in enumerate(("organisation_id", "project_id", "key_id")):
        demand = caller.demand(NO_POLICIES)
        setattr(demand, name, "another")
        strangers.append((demand, await caller.admit(demand), 10**index))
    yesterday = caller.demand(NO_POLICIES, at_ms=int(bench.clock.now() * 1000) - 31 * DAY_MS)
    strangers.append((yesterday, await caller.admit(yesterday), 50))
    await caller.admit(caller.demand(policies(*budgets), cost=0))
    for demand, grant, cost in strangers:
        caller.settle(demand, grant, cost=cost)
    left = [await _room(caller, policies(each)) for each in budgets]
    # Those of another organisation (1), project (10) and key (100) count for the other two.
    assert left == [100 - 11, -1, -1]


async def test_a_call_of_a_key_counts_for_budgets_of_those_that_it_was_rotated_from(
    bench: MemoryBench, caller: Caller
) -> None:
    demand = caller.demand(Policies((), (), ("key_0", KEY)))
    demand.key_id = "key_2"
    grant = await caller.admit(demand)
    assert await _room(caller) == 100
    caller.settle(demand, grant, cost=30)
    assert await _room(caller) == 70


async def test_budgets_without_an_end_that_nobody_asks_for_are_forgotten(bench: MemoryBench, caller: Caller) -> None:
    used, unused, running = (
        policies(budget(100, id=name, period=Period.TOTAL)) for name in ("bud_used", "bud_unused", "bud_running")
    )
    calls = [(demand := caller.demand(applying, cost=30), await caller.admit(demand)) for applying in (used, unused)]
    call = caller.demand(running, cost=30)
    grant = await caller.admit(call)
    for ended in calls:
        caller.settle(*ended, cost=30)
    for _ in range(48):
        await bench.limiter.tidy()
        bench.clock.advance(1_800)
        # All are of one key: each counts for all.
        assert await _room(caller, used) == 40
        assert bench.limiter.figures.budgets == 3
    await bench.limiter.tidy()
    assert bench.limiter.figures.budgets == 2
    # What runs holds it; after that it is as with the others.
    caller.settle(call, grant, cost=10)
    await bench.limiter.tidy()
    assert bench.limiter.figures.budgets == 1
    bench.ledger.spent |= {"b:bud_unused:0": 70, "b:bud_running:0": 70}
    assert [await _room(caller, applying) for applying in (used, unused, running)] == [30, 30, 30]


async def test_the_next_period_is_loaded_before_it_begins(bench: MemoryBench, caller: Caller) -> None:
    daily = policies(budget(100, period=Period.DAY))
    midnight = (int(bench.clock.now() * 1000) // DAY_MS + 1) * DAY_MS
    bench.clock.advance(midnight / 1000 - bench.clock.now() - 50)
    demand = caller.demand(daily, cost=90)
    grant = await caller.admit(demand)
    await bench.limiter.tidy()
    await _until(lambda: bench.limiter.figures.loading == 0)
    assert [period.from_ms for period in bench.ledger.asked[-1]] == [midnight]
    bench.clock.advance(60)
    bench.ledger.away = True
    assert bench.limiter.try_admit(caller.demand(daily, cost=100)) is not None
    # The old day is kept until what began in it has ended.
    await bench.limiter.tidy()
    assert bench.limiter.figures.budgets == 2
    caller.settle(demand, grant, cost=90)
    await bench.limiter.tidy()
    assert bench.limiter.figures.budgets == 1
    # And a day that nobody has used is not followed by others.
    assert len(bench.ledger.asked) == 2


async def test_questions_are_shared_and_small(bench: MemoryBench, caller: Caller) -> None:
    budgets = [budget(100, id=f"bud_{number}") for number in range(1200)]
    async with asyncio.TaskGroup() as calls:
        for each in budgets + budgets:
            calls.create_task(caller.admit(caller.demand(policies(each), cost=1)))
    assert sum(map(len, bench.ledger.asked)) <= 1201
    assert max(map(len, bench.ledger.asked)) <= 500
    assert bench.limiter.figures.budgets == 1200


def test_a_call_waits_five_seconds_at_most_and_the_loading_goes_on() -> None:
    async def call() -> None:
        async with run_memory_limiter() as bench:
            caller = Caller(bench)
            bench.ledger.away = True
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(HelixError):
                await caller.admit(caller.demand(MONEY, cost=1, wait_s=60))
            assert loop.time() - began == pytest.approx(5, abs=0.1)
            # Asked again and again, and not in a frenzy.
            assert 5 <= bench.limiter.figures.failures <= 12
            bench.ledger.away = False
            await asyncio.sleep(1.1)
            assert bench.limiter.try_admit(caller.demand(MONEY, cost=1)) is not None

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(call())
