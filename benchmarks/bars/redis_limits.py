"""CPU of an admission and its settlement through Redis, against redis-py's `EVALSHA` on the same server, in turns.

Without gateways around: 32 callers, each of which admits and settles a call with three limits and a budget. The limiter
asks for leave and tells the end in two scripts; redis-py is timed with one script that does nothing.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence

import redis.asyncio
import uvloop

from benchmarks.report import Options, Result, median, spread
from helixflow.core.clock import SystemClock
from helixflow.metering.admission import Demand, Settlement
from helixflow.metering.policies import Budget, Limit, Metric, Period, Policies, Scope, Unit
from helixflow.metering.redis.link import RedisLink
from helixflow.metering.redis.redis_limiter import RedisLimiter
from helixflow.metering.redis.resp import Reply, encode_arguments
from helixflow.metering.spend import BudgetPeriod, SpendView
from tests.harness.redis import RedisServer

CALLERS = 32
# Of our side of one EVALSHA, however the server spends its time.
EVALSHA_LIMIT_US = 10.0
_MANY = 10**9
_ORGANISATION = "org_bench"
_NOTHING = "return 0"


class _Ledger:
    """Nothing has been spent, and no journal is open."""

    async def read(self, periods: Sequence[BudgetPeriod]) -> SpendView:
        return SpendView([0] * len(periods), {})


def run(options: Options) -> list[Result]:
    calls = 10_000 if options.quick else 40_000
    server = RedisServer.create()
    try:
        return uvloop.run(_measure(server, calls, options.rounds))
    finally:
        server.remove()


async def _measure(server: RedisServer, calls: int, rounds: int) -> list[Result]:
    limiter = RedisLimiter(
        server.settings(),
        _Ledger(),
        SystemClock(),
        journal_id="0" * 24,
        position=lambda: 0,
        acknowledge=lambda _: None,
    )
    client = redis.asyncio.Redis(port=server.port, password=server.password, max_connections=CALLERS)
    link = RedisLink(server.settings(), "bench")
    connection, _ = await link.connect(_ignore, _ignore_loss)
    # A script that does nothing: `settle` without settlements.
    nothing = encode_arguments(b"1", b"nothing", b"x" * 200, b"\x90")
    digest = await client.script_load(_NOTHING)
    seen: dict[str, list[float]] = {"admit and settle": [], "EVALSHA": [], "redis-py": []}

    async def admit_and_settle() -> None:
        call_id = secrets.token_hex(16)
        now_ms = int(time.time() * 1000)
        demand = Demand(call_id, _ORGANISATION, _POLICIES, 100, 200, 1000, now_ms, loop.time() + 60)
        grant = limiter.try_admit(demand)
        if grant is None:
            grant = await limiter.admit(demand)
        limiter.settle(Settlement(call_id, _ORGANISATION, grant.holds, 80, 700, 0))

    async def evaluate() -> None:
        await connection.evaluate(link.scripts.settle, nothing)

    async def by_library() -> None:
        await client.evalsha(digest, 1, "nothing", "x" * 200, b"\x90")

    loop = asyncio.get_running_loop()
    running = asyncio.create_task(limiter.run())
    try:
        for turn in range(rounds + 1):
            for name, act in (("admit and settle", admit_and_settle), ("EVALSHA", evaluate), ("redis-py", by_library)):
                took = await _time(act, calls if name != "redis-py" else calls // 4)
                if turn:  # the first one warms up
                    seen[name].append(took)
    finally:
        running.cancel()
        connection.close()
        await client.aclose()
        await asyncio.wait([running])
    results = []
    for name, limit in (("admit and settle", None), ("EVALSHA", EVALSHA_LIMIT_US), ("redis-py", None)):
        values = seen[name]
        metric = {"EVALSHA": "our EVALSHA", "redis-py": "redis-py's EVALSHA"}.get(name, name)
        results.append(Result("redis_limits", f"CPU of {metric}", median(values), "µs", limit, detail=spread(values)))
    return results


async def _time(act: Callable[[], Awaitable[None]], calls: int) -> float:
    """Microseconds of this process' CPU for one of so many."""

    async def caller() -> None:
        for _ in range(calls // CALLERS):
            await act()

    began = time.process_time()
    async with asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(caller())
    return (time.process_time() - began) / (calls // CALLERS * CALLERS) * 1e6


def _limit(metric: Metric, burst: int) -> Limit:
    return Limit(metric.name, _ORGANISATION, Scope.ORGANISATION, _ORGANISATION, "", metric, _MANY, burst)


_POLICIES = Policies(
    (
        _limit(Metric.REQUESTS_PER_MINUTE, _MANY),
        _limit(Metric.TOKENS_PER_MINUTE, _MANY),
        _limit(Metric.PARALLEL_REQUESTS, 0),
    ),
    (Budget("b", _ORGANISATION, Scope.ORGANISATION, _ORGANISATION, Unit.MONEY, Period.MONTH, _MANY * 1000),),
)


def _ignore(_answer: "asyncio.Future[Reply]", _reply: Reply) -> None:
    """Nobody gives up here."""


def _ignore_loss(_reason: str) -> None:
    """Whoever waits sees it."""
