"""A Redis limiter on the bench of the contract that all limiters keep, see `limiters`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from helixflow.core.clock import SystemClock
from helixflow.metering.redis.redis_limiter import RedisLimiter
from tests.harness.limiters import JOURNAL, FakeLedger
from tests.harness.redis import RedisServer


class RedisBench:
    """Implements `Bench`: its clock is the server's, which nobody can move."""

    def __init__(self, server: RedisServer) -> None:
        self.clock = SystemClock()
        self.position = 0
        self.ledger = FakeLedger(lambda: self.position)
        self._redis = server.client()
        self.limiter = RedisLimiter(
            server.settings(),
            self.ledger,
            self.clock,
            journal_id=JOURNAL,
            position=lambda: self.position,
            acknowledge=lambda _: None,
        )

    async def pass_time(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def now_us(self) -> int:
        seconds, microseconds = self._redis.time()
        return int(seconds) * 1_000_000 + int(microseconds)

    def close(self) -> None:
        self._redis.close()


@asynccontextmanager
async def run_redis_limiter(server: RedisServer) -> AsyncIterator[RedisBench]:
    server.start()
    server.flush()
    bench = RedisBench(server)
    running = asyncio.create_task(bench.limiter.run())
    try:
        async with asyncio.timeout(60):
            while not bench.limiter.figures.joins:
                await asyncio.sleep(0.001)
        yield bench
    finally:
        await bench.limiter.close()
        running.cancel()
        await asyncio.wait([running])
        bench.close()
        if not running.cancelled():
            running.result()
