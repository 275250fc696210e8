"""Limits of several gateways through a real Redis: exact over all of them; without it, a share for each."""

import asyncio
import gc
from collections.abc import Iterator

import pytest
import redis

from helixflow.core.errors import HelixError
from helixflow.metering.admission import Refusal
from helixflow.metering.policies import Limit, Metric, Policies, Scope
from helixflow.metering.redis.closing import RedisJournalCloser
from tests.harness.redis import RedisServer
from tests.harness.spending import ORGANISATION, Ledger, Spender

GATEWAYS = 3


@pytest.fixture
def server(redis_server: RedisServer) -> Iterator[RedisServer]:
    redis_server.start()
    redis_server.flush()
    yield redis_server
    redis_server.start()
    redis_server.resume()


def limited(metric: Metric, value: int, burst: int = 0) -> Policies:
    return Policies((Limit(metric.name, ORGANISATION, Scope.ORGANISATION, ORGANISATION, "", metric, value, burst),))


def server_time_us(client: redis.Redis) -> int:
    seconds, microseconds = client.time()  # type: ignore[misc]
    return int(seconds) * 1_000_000 + int(microseconds)


@pytest.mark.parametrize(("value", "burst"), [(1000, 1000), (1000, 50), (6000, 600)])
async def test_ten_thousand_calls_over_three_gateways_get_exactly_the_limit(
    server: RedisServer, request: pytest.FixtureRequest, value: int, burst: int
) -> None:
    ledger = Ledger()
    policies = limited(Metric.REQUESTS_PER_MINUTE, value, burst)
    settings = server.settings(timeout_s=5)
    administration = server.client()
    spenders = [Spender.create(settings, ledger) for _ in range(GATEWAYS)]
    admitted = asked_until = 0

    async def client(spender: Spender, calls: int) -> None:
        nonlocal admitted, asked_until
        for number in range(calls):
            # After that there are still more calls to come than there can be leave for.
            if number == calls - 10:
                asked_until = server_time_us(administration)
            try:
                spender.settle(await spender.admit(policies))
            except Refusal:
                continue
            admitted += 1

    async with spenders[0], spenders[1], spenders[2]:
        for spender in spenders:
            await spender.admit(limited(Metric.PARALLEL_REQUESTS, 10))
        # Collecting this process' garbage takes 0.4 s, in which nobody asks, and a bucket that is full gets nothing.
        request.addfinalizer(gc.enable)
        gc.collect()
        gc.disable()
        # Nothing is refilled before the first has been taken.
        began = server_time_us(administration)
        await spenders[0].admit(policies)
        taken = server_time_us(administration)
        admitted = 1
        async with asyncio.TaskGroup() as clients:
            for number in range(100):
                clients.create_task(client(spenders[number % GATEWAYS], 100))
        ended = server_time_us(administration)
    administration.close()
    assert burst + (asked_until - taken) * value // 60_000_000 - 1 <= admitted
    assert admitted <= burst + (ended - began) * value // 60_000_000


async def test_parallel_requests_are_counted_over_all_gateways_also_dead_ones(server: RedisServer) -> None:
    ledger = Ledger()
    policies = limited(Metric.PARALLEL_REQUESTS, 4)
    first, second = (Spender.create(server.settings(), ledger) for _ in range(2))
    async with first, second:
        calls = [await spender.admit(policies) for spender in (first, second, first, second)]
        with pytest.raises(Refusal):
            await second.admit(policies)
        second.settle(calls[1])
        await second.admit(policies)
        await first.die()
        with pytest.raises(Refusal):
            await second.admit(policies)
        await RedisJournalCloser(server.settings()).settle(first.journal_id, first.interrupt(lambda _: 0))
        for _ in range(2):
            await second.admit(policies)
        with pytest.raises(Refusal):
            await second.admit(policies)


async def test_without_redis_each_gateway_gives_its_share(server: RedisServer) -> None:
    ledger = Ledger()
    settings = server.settings(timeout_s=1, gateways=4)
    async with Spender.create(settings, ledger) as spender:
        parallel = limited(Metric.PARALLEL_REQUESTS, 12)
        running = [await spender.admit(parallel) for _ in range(2)]
        server.kill()
        running.append(await spender.admit(parallel))
        with pytest.raises(Refusal) as caught:
            await spender.admit(parallel)
        assert caught.value.limit == parallel.limits[0]
        spender.settle(running[0])
        await spender.admit(parallel)

        rate = limited(Metric.REQUESTS_PER_MINUTE, 40, 40)
        for _ in range(10):
            await spender.admit(rate)
        with pytest.raises(Refusal) as caught:
            await spender.admit(rate)
        assert caught.value.retry_after_s == pytest.approx(6, abs=1)
        # A call that is larger than the share, and not than the limit, takes all of the share.
        tokens = limited(Metric.TOKENS_PER_MINUTE, 4000, 4000)
        await spender.admit(tokens, tokens=3000)
        with pytest.raises(Refusal):
            await spender.admit(tokens, tokens=1)
        assert spender.limiter.figures.away

        server.start()
        async with asyncio.timeout(60):
            while spender.limiter.figures.away:
                await asyncio.sleep(0.01)
        # What runs is counted there now: three of the twelve.
        for _ in range(9):
            await spender.admit(parallel)
        with pytest.raises(Refusal):
            await spender.admit(parallel)


async def test_limits_hold_while_the_ledger_is_down_and_redis_is_new(server: RedisServer) -> None:
    ledger = Ledger()
    ledger.is_down = True
    async with Spender.create(server.settings(), ledger) as spender:
        await spender.admit(limited(Metric.REQUESTS_PER_MINUTE, 1, 1))
        with pytest.raises(Refusal):
            await spender.admit(limited(Metric.REQUESTS_PER_MINUTE, 1, 1))
        assert not spender.limiter.figures.fallbacks


async def test_limits_that_are_idle_leave_nothing_in_redis(server: RedisServer) -> None:
    async with Spender.create(server.settings(), Ledger()) as spender:
        spender.settle(await spender.admit(limited(Metric.REQUESTS_PER_MINUTE, 60, 60)))
        spender.settle(await spender.admit(limited(Metric.PARALLEL_REQUESTS, 1)))
        await spender.limiter.close()
        with server.client() as client:
            assert client.keys("hf:*:p:*") == []
            # A second until it is full, and one to spare.
            assert 0 < int(client.pttl(f"hf:{{{ORGANISATION}}}:l:REQUESTS_PER_MINUTE")) <= 2001  # type: ignore[arg-type]


async def test_without_any_server_calls_are_decided_at_once(server: RedisServer) -> None:
    server.kill()
    async with Spender.create(server.settings(), Ledger()) as spender:
        await asyncio.wait_for(spender.admit(limited(Metric.REQUESTS_PER_MINUTE, 10, 10)), 10)
        assert spender.limiter.figures.fallbacks == 1


async def test_the_closer_says_when_the_server_is_away(server: RedisServer) -> None:
    server.kill()
    with pytest.raises(HelixError):
        await RedisJournalCloser(server.settings()).close("0" * 24, ())
