"""Budgets of several gateways through a real Redis: never over the cap, and nearly all of it usable, whatever ends."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Refusal, Settlement
from helixflow.metering.money import NANOS
from helixflow.metering.policies import Budget, Period, Policies, Scope, Unit
from helixflow.metering.redis.closing import RedisJournalCloser
from helixflow.metering.shipping.closing import LostCall
from tests.harness.redis import RedisServer
from tests.harness.spending import ORGANISATION, Ledger, Spender

BUDGET = NANOS
# The worst case of one call: half a per cent of the budget.
BOUND = BUDGET // 200
GATEWAYS = 3
WORKERS = 20
ENOUGH_REFUSALS = 20
NOW_MS = 1_790_000_000_000

Disruption = Callable[[list[Spender]], Awaitable[None]]


@pytest.fixture
def server(redis_server: RedisServer) -> Iterator[RedisServer]:
    redis_server.start()
    redis_server.flush()
    yield redis_server
    redis_server.start()
    redis_server.resume()


def budget(cap: int = BUDGET, name: str = "b1", unit: Unit = Unit.MONEY, period: Period = Period.MONTH) -> Policies:
    return Policies((), (Budget(name, ORGANISATION, Scope.ORGANISATION, ORGANISATION, unit, period, cap),))


@asynccontextmanager
async def gateways(server: RedisServer, ledger: Ledger, count: int, **settings: object) -> AsyncIterator[list[Spender]]:
    """So many, each with a shipper."""
    spenders = [Spender.create(server.settings(**{"timeout_s": 1, **settings}), ledger) for _ in range(count)]
    async with AsyncExitStack() as stack:
        shipping = [asyncio.create_task(spender.ship_often()) for spender in spenders]
        try:
            for spender in spenders:
                await stack.enter_async_context(spender)
            yield spenders
        finally:
            for task in shipping:
                task.cancel()
            await asyncio.gather(*shipping, return_exceptions=True)


async def spend_all(spenders: list[Spender], policies: Policies, disrupt: Disruption | None = None) -> list[str]:
    """Many clients call until they have been refused many times. Returns why calls were refused, other than by the
    budget. `disrupt` happens when half is spent."""
    problems: list[str] = []
    chance = random.Random(4)

    async def client(spender: Spender) -> None:
        refusals = 0
        while refusals < ENOUGH_REFUSALS:
            bound = chance.randint(1, BOUND)
            try:
                call_id = await spender.admit(policies, cost=bound)
            except Refusal:
                refusals += 1
                await asyncio.sleep(0.01)
                continue
            except HelixError as exc:
                problems.append(exc.code)
                refusals += 1
                await asyncio.sleep(0.01)
                continue
            refusals = 0
            await asyncio.sleep(chance.random() * 0.01)
            spender.settle(call_id, cost=chance.randint(0, bound))

    async def disrupt_midway() -> None:
        while sum(spender.cost for spender in spenders) < BUDGET // 2:
            await asyncio.sleep(0.001)
        assert disrupt is not None
        await disrupt(spenders)

    async with asyncio.TaskGroup() as tasks:
        for spender in spenders:
            for _ in range(WORKERS):
                tasks.create_task(client(spender))
        if disrupt is not None:
            tasks.create_task(disrupt_midway())
    return problems


async def test_three_gateways_spend_one_budget_and_not_more(server: RedisServer) -> None:
    ledger = Ledger()
    async with gateways(server, ledger, GATEWAYS) as spenders:
        problems = await spend_all(spenders, budget())
        spent = sum(spender.cost for spender in spenders)
        assert BUDGET * 0.95 <= spent <= BUDGET
        assert problems == []
        assert counted(server) == spent


async def test_when_redis_is_killed_midway_the_leases_are_all_that_is_spent(server: RedisServer) -> None:
    at_loss = 0

    async def kill(spenders: list[Spender]) -> None:
        nonlocal at_loss
        server.kill()
        at_loss = sum(spender.cost for spender in spenders)

    ledger = Ledger()
    async with gateways(server, ledger, GATEWAYS) as spenders:
        await spend_all(spenders, budget(), kill)
        spent = sum(spender.cost for spender in spenders)
        # Leases of a per cent of what was left, and what was in flight.
        assert at_loss < spent <= at_loss + BUDGET * 3 // 100 + GATEWAYS * WORKERS * BOUND
        assert all(spender.limiter.figures.fallbacks for spender in spenders)

        # It comes back empty: budgets begin again with the ledger's sum.
        server.start()
        await joined(spenders, 2)
        assert await spend_all(spenders, budget()) == []
        spent = sum(spender.cost for spender in spenders)
        assert BUDGET * 0.95 <= spent <= BUDGET
        assert counted(server) == spent


async def test_when_all_is_lost_midway_budgets_are_rebuilt_from_the_ledger_and_open_calls(server: RedisServer) -> None:
    async def flush(spenders: list[Spender]) -> None:
        server.flush()

    ledger = Ledger()
    async with gateways(server, ledger, GATEWAYS) as spenders:
        await spend_all(spenders, budget(), flush)
        spent = sum(spender.cost for spender in spenders)
        assert BUDGET * 0.95 <= spent <= BUDGET
        assert counted(server) == spent


async def test_when_redis_hangs_for_a_while_nothing_counts_twice(server: RedisServer) -> None:
    async def pause(spenders: list[Spender]) -> None:
        server.pause()
        await until(lambda: all(spender.limiter.figures.away for spender in spenders))
        server.resume()

    ledger = Ledger()
    async with gateways(server, ledger, GATEWAYS) as spenders:
        await spend_all(spenders, budget(), pause)
        await joined(spenders, 2)
        await spend_all(spenders, budget())
        spent = sum(spender.cost for spender in spenders)
        assert BUDGET * 0.95 <= spent <= BUDGET
        assert counted(server) == spent


async def test_a_killed_gateway_is_closed_from_its_journal(server: RedisServer) -> None:
    ledger = Ledger()
    closer = RedisJournalCloser(server.settings())

    async with gateways(server, ledger, GATEWAYS) as spenders:
        victim = spenders[0]
        # One call runs, one was granted and not admitted, and one has ended.
        running = await victim.admit(budget(), cost=BOUND)
        unknown = await victim.admit(budget(), cost=BOUND)
        ended = await victim.admit(budget(), cost=BOUND)
        victim.settle(ended, cost=BOUND // 2)
        await leased(victim)
        await victim.die()
        del victim.open_calls[unknown]
        settlements = victim.interrupt(lambda call_id: {running: BOUND // 4}[call_id])
        for _ in range(2):
            await settle_all(closer, victim.journal_id, settlements)
        victim.ship()
        del ledger.positions[victim.journal_id]
        assert counted(server) == BOUND // 2 + BOUND // 4
        assert reserved(server) == 0

        await spend_all(spenders[1:], budget())
        spent = sum(spender.cost for spender in spenders)
        assert BUDGET * 0.95 <= spent <= BUDGET
        assert counted(server) == spent


async def test_a_lost_journal_is_charged_in_full(server: RedisServer) -> None:
    async with gateways(server, Ledger(), 1, lease_per_mille=0) as [victim]:
        closer = RedisJournalCloser(server.settings())
        call_id = await victim.admit(budget(period=Period.TOTAL), cost=BOUND, at_ms=NOW_MS)
        victim.settle(await victim.admit(budget(period=Period.TOTAL), cost=BOUND), cost=1)
        await acknowledged([victim])
        await victim.die()
        assert await closer.list_lost(victim.journal_id) == [LostCall(call_id, ORGANISATION, "", "", NOW_MS, BOUND)]
        for _ in range(2):
            await closer.close_lost(victim.journal_id)
            assert await closer.list_lost(victim.journal_id) == []
        assert (counted(server), reserved(server)) == (BOUND + 1, 0)


async def test_calls_that_were_restored_after_a_loss_are_known_when_their_journal_is_lost(server: RedisServer) -> None:
    async with gateways(server, Ledger(), 1, lease_per_mille=0) as [victim]:
        call_id = await victim.admit(budget(period=Period.TOTAL), cost=BOUND, at_ms=NOW_MS)
        server.flush()
        await joined([victim], 2)
        await victim.die()
        lost = await RedisJournalCloser(server.settings()).list_lost(victim.journal_id)
        assert lost == [LostCall(call_id, ORGANISATION, "", "", NOW_MS, BOUND)]


async def test_a_lost_journal_is_charged_in_full_with_its_lease(server: RedisServer) -> None:
    async with gateways(server, Ledger(), 1, lease_per_mille=100) as [victim]:
        await victim.admit(budget(), cost=BOUND)
        await leased(victim)
        await victim.die()
        for _ in range(2):
            await RedisJournalCloser(server.settings()).close_lost(victim.journal_id)
        assert (counted(server), reserved(server)) == (BOUND + BUDGET // 10, 0)


async def test_a_gateway_that_dies_on_its_lease_has_spent_what_it_used_of_it(server: RedisServer) -> None:
    ledger = Ledger()
    async with gateways(server, ledger, 1, lease_per_mille=100) as [victim]:
        victim.settle(await victim.admit(budget(), cost=BOUND))
        await leased(victim)
        server.pause()
        for _ in range(2):
            call_id = await victim.admit(budget(), cost=BOUND)
            assert ("lease", 1) in victim.open_calls[call_id].holds
        await victim.die()
        server.resume()
        closer = RedisJournalCloser(server.settings())
        settlements = victim.interrupt(lambda _: BOUND)
        # The first of them asked Redis before it was known to be away: its reservation may have come through.
        for _ in range(2):
            await settle_all(closer, victim.journal_id, settlements)
        assert (counted(server), reserved(server)) == (2 * BOUND, 0)


async def test_without_redis_budgets_give_the_lease_and_then_refuse_for_a_while(server: RedisServer) -> None:
    async with gateways(server, Ledger(), 1, lease_per_mille=10) as [spender]:
        spender.settle(await spender.admit(budget(), cost=BOUND))
        await leased(spender)
        server.kill()
        granted = 0
        with pytest.raises(Refusal) as caught:
            while True:
                await spender.admit(budget(), cost=BOUND)
                granted += 1
        assert granted * BOUND == BUDGET // 100
        assert caught.value.budget is not None
        assert caught.value.retry_after_s == 1


async def test_calls_that_began_on_the_lease_end_in_redis(server: RedisServer) -> None:
    async with gateways(server, Ledger(), 1, lease_per_mille=100) as [spender]:
        spender.settle(await spender.admit(budget(), cost=BOUND), cost=BOUND)
        await leased(spender)
        server.pause()
        ended, runs = [await spender.admit(budget(), cost=BOUND) for _ in range(2)]
        spender.settle(ended, cost=BOUND // 2)
        server.resume()
        await joined([spender], 2)
        assert counted(server) == BOUND + BOUND // 2
        spender.settle(runs, cost=BOUND // 4)
        await acknowledged([spender])
        assert counted(server) == spender.cost == BOUND + BOUND // 2 + BOUND // 4


async def test_a_call_open_at_the_loss_counts_once_wherever_the_ledger_is(server: RedisServer) -> None:
    """It ends before or after the budget is known again, and its end is shipped before or after."""
    for shipped_first in (True, False):
        server.flush()
        ledger = Ledger()
        spender = Spender.create(server.settings(lease_per_mille=0), ledger)
        async with spender:
            asyncio.get_running_loop().call_soon(spender.ship)
            early, late, other = [await spender.admit(budget(), cost=BOUND) for _ in range(3)]
            spender.ship()
            server.flush()
            await joined([spender], 2)
            spender.settle(early, cost=10)
            await acknowledged([spender])
            waiting = asyncio.create_task(spender.admit(budget(), cost=BOUND))
            if shipped_first:
                # Its end is in the ledger's sum before Redis is told of it.
                spender.position += 1
                spender.ledger.cost += 20
            await until(lambda spender=spender: spender.limiter.figures.loading)
            spender.ship()
            probe = await waiting
            if shipped_first:
                spender.position -= 2
                spender.settle(late, cost=20)
                spender.unshipped.clear()
            else:
                spender.settle(late, cost=20)
            spender.settle(other, cost=30)
            spender.release(probe)
            await acknowledged([spender])
            assert (counted(server), reserved(server)) == (60, 0)


async def test_while_a_journal_has_not_joined_again_nobody_can_say_what_is_left(server: RedisServer) -> None:
    ledger = Ledger()
    async with gateways(server, ledger, 2) as [spender, victim]:
        await victim.admit(budget(), cost=BUDGET)
        await victim.die()
        server.flush()
        with pytest.raises(HelixError) as caught:
            await spender.admit(budget(), cost=BOUND, wait_s=0.6)
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        # The shipper closes it: all that it spent is in the ledger.
        victim.interrupt(lambda _: BUDGET - BOUND)
        victim.ship()
        del ledger.positions[victim.journal_id]
        await spender.admit(budget(), cost=BOUND)
        with pytest.raises(Refusal):
            await spender.admit(budget(), cost=1)


async def test_while_the_ledger_is_down_known_budgets_go_on_and_others_wait(server: RedisServer) -> None:
    ledger = Ledger()
    async with gateways(server, ledger, 1) as [spender]:
        await spender.admit(budget(), cost=BOUND)
        ledger.is_down = True
        await spender.admit(budget(), cost=BOUND)
        with pytest.raises(HelixError) as caught:
            await spender.admit(budget(name="b2"), cost=BOUND, wait_s=0.3)
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        ledger.is_down = False
        await spender.admit(budget(name="b2"), cost=BOUND)


async def test_the_end_waits_for_redis_no_longer_than_its_timeout(server: RedisServer) -> None:
    async with gateways(server, Ledger(), 1, timeout_s=2) as [spender]:
        call_id = await spender.admit(budget(), cost=BOUND)
        server.pause()
        spender.settle(call_id)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await spender.limiter.close()
        assert loop.time() - began < 10
        assert spender.limiter.figures.unsent == 1
        server.resume()
        await joined([spender], 2)
        await acknowledged([spender])
        # Without `run` there is nobody to send anything.
        call_id = await spender.admit(budget(), cost=BOUND)
        await spender.die()
        spender.settle(call_id)
        began = loop.time()
        await spender.limiter.close()
        assert loop.time() - began < 1.5
        assert spender.limiter.figures.unsent == 1


async def test_a_server_that_starts_again_with_its_data_is_not_trusted(server: RedisServer) -> None:
    """It has saved most of it, and not the newest."""
    ledger = Ledger()
    async with gateways(server, ledger, 1) as [spender]:
        spender.settle(await spender.admit(budget(), cost=BOUND), cost=BOUND)
        await acknowledged([spender])
        with server.client() as client:
            client.save()
        spender.settle(await spender.admit(budget(), cost=BOUND), cost=BOUND)
        await acknowledged([spender])
        server.kill()
        await until(lambda: spender.limiter.figures.away)
        server.start()
        await joined([spender], 2)
        await spender.admit(budget(), cost=BOUND)
        assert counted(server) == 2 * BOUND
        with server.client() as client:
            await until(lambda: not client.exists("hf:garbage"))
            assert len(client.keys("hf:*:b:*")) == 1


async def test_a_call_that_gives_up_while_it_asks_leaves_nothing_behind(server: RedisServer) -> None:
    async with gateways(server, Ledger(), 1, lease_per_mille=0) as [spender]:
        spender.release(await spender.admit(budget(), cost=BOUND))
        tasks = [asyncio.create_task(spender.admit(budget(), cost=BOUND)) for _ in range(10)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        assert all(isinstance(result, BaseException) for result in await asyncio.gather(*tasks, return_exceptions=True))
        await spender.admit(budget(), cost=BOUND)
        await acknowledged([spender])
        assert reserved(server) == BOUND


async def settle_all(closer: RedisJournalCloser, journal_id: str, settlements: list[Settlement]) -> None:
    """As the shipper does, some at a time."""
    kept: list[Settlement] = []
    for start in range(0, len(settlements), 2):
        kept += await closer.settle(journal_id, settlements[start : start + 2])
    await closer.close(journal_id, kept)


def counted(server: RedisServer) -> int:
    return sum(int(value) for value in _fields(server, b"spent"))


def reserved(server: RedisServer) -> int:
    return sum(int(value) for value in _fields(server, b"reserved"))


def _fields(server: RedisServer, field: bytes) -> list[bytes]:
    with server.client() as client:
        epoch = client.hget("hf:epoch", "id")
        assert isinstance(epoch, bytes)
        keys = client.keys(b"hf:" + epoch + b":*:b:*")
        assert isinstance(keys, list)
        return [value for key in keys if isinstance(value := client.hget(key, field.decode()), bytes)]


async def joined(spenders: list[Spender], times: int) -> None:
    await until(lambda: all(spender.limiter.figures.joins >= times for spender in spenders))


async def acknowledged(spenders: list[Spender]) -> None:
    for spender in spenders:
        await spender.limiter.close()
        assert spender.limiter.figures.unsent == 0


async def leased(spender: Spender) -> None:
    await until(lambda: spender.limiter.figures.leases)


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
