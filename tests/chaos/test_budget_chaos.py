"""Several gateways, one budget: never over, whatever becomes of Redis; and one limit, exact over all of them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.harness.metering import MODEL, chat_body, run_mock_node
from tests.harness.node import CHAT, Node, eventually
from tests.harness.postgres import PostgresServer
from tests.harness.redis import RedisServer
from tests.harness.visitor import Visitor, visit

GATEWAYS = 3
CLIENTS = 200
CAP_NANODOLLARS = 10**9
# A call costs at most 0.4 % of the budget by these.
RATES = {"input": "10", "output": "100"}
MAX_TOKENS = 20
# Who is refused tries again for so long.
PATIENCE_S = 6.0


@pytest.fixture
def fleet(tmp_path: Path, postgres_server: PostgresServer, redis_server: RedisServer) -> Iterator[tuple[Node, str]]:
    """Three gateways with PostgreSQL and Redis, and the database's URL with its password."""
    redis_server.start()
    redis_server.flush()
    with postgres_server.database() as url:
        database = postgres_server.settings(url, tmp_path / "postgres")
        redis = redis_server.settings()
        with run_mock_node(
            tmp_path,
            HELIXFLOW_GATEWAY__WORKERS=str(GATEWAYS),
            HELIXFLOW_DATABASE__URL=url,
            HELIXFLOW_DATABASE__PASSWORD_FILE=str(database.password_file),
            HELIXFLOW_REDIS__URL=redis.url,
            HELIXFLOW_REDIS__PASSWORD_FILE=str(redis.password_file),
            HELIXFLOW_REDIS__GATEWAYS=str(GATEWAYS),
        ) as node:
            yield node, url.replace("://helixflow@", f"://helixflow:{postgres_server.role_password}@")


@contextlib.asynccontextmanager
async def customers(node: Node, count: int) -> AsyncIterator[list[Visitor]]:
    """So many clients with connections of their own, so that the kernel spreads them over the gateways."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(visit(node)) for _ in range(count)]


async def spend(visitors: list[Visitor], until_refused_s: float = PATIENCE_S) -> list[int]:
    """All ask until nothing has been admitted for a while; the statuses."""
    statuses: list[int] = []
    admitted_at = time.monotonic()

    async def ask(visitor: Visitor) -> None:
        nonlocal admitted_at
        while time.monotonic() - admitted_at < until_refused_s:
            answer = await visitor.ask("POST", CHAT, chat_body(MODEL, max_tokens=MAX_TOKENS))
            statuses.append(answer.status_code)
            if answer.status_code == 200:
                admitted_at = time.monotonic()
            else:
                await asyncio.sleep(0.1)

    await asyncio.gather(*(ask(visitor) for visitor in visitors))
    return statuses


async def total(url: str) -> tuple[int, int]:
    """What the ledger says was spent, nanodollars, by how many requests."""
    connection = await asyncpg.connect(url)
    try:
        row: Any = await connection.fetchrow(
            "SELECT coalesce(sum(cost), 0) AS cost, count(*) AS requests FROM requests"
        )
    finally:
        await connection.close()
    return int(row["cost"]), int(row["requests"])


async def ledger_has(url: str, requests: int) -> int:
    """Waits until the ledger has so many requests; what they cost."""
    deadline = time.monotonic() + 120
    while (found := await total(url))[1] < requests:
        assert time.monotonic() < deadline, f"the ledger has {found[1]} of {requests} requests"
        await asyncio.sleep(0.1)
    return found[0]


async def prepare(node: Node) -> None:
    """One price, one budget of a dollar."""
    async with visit(node) as operator:
        await operator.make("/prices", {"subject_kind": "model", "subject": MODEL, "rates": RATES})
        await operator.make("/budgets", {"scope": "organisation", "unit": "money", "period": "month", "cap": "1"})


async def test_a_dollar_over_three_gateways(fleet: tuple[Node, str]) -> None:
    node, url = fleet
    await prepare(node)
    async with customers(node, CLIENTS) as visitors:
        statuses = await spend(visitors)
    assert set(statuses) <= {200, 429, 503}
    spent = await ledger_has(url, statuses.count(200))
    assert spent <= CAP_NANODOLLARS
    assert spent >= 0.95 * CAP_NANODOLLARS


async def test_a_dollar_when_redis_dies_midway(fleet: tuple[Node, str], redis_server: RedisServer) -> None:
    node, url = fleet
    await prepare(node)
    async with customers(node, CLIENTS) as visitors:
        spending = asyncio.create_task(spend(visitors))
        while (await total(url))[0] < 0.3 * CAP_NANODOLLARS and not spending.done():
            await asyncio.sleep(0.02)
        redis_server.kill()
        statuses = await spending
        assert 200 in statuses
        assert await ledger_has(url, statuses.count(200)) <= CAP_NANODOLLARS
        # Empty, as after a restart without persistence: it must not begin again from nothing.
        redis_server.start()
        statuses += await spend(visitors)
    spent = await ledger_has(url, statuses.count(200))
    assert spent <= CAP_NANODOLLARS
    assert await eventually(lambda: node.records("redis.restored"))


async def test_one_limit_over_three_gateways(fleet: tuple[Node, str]) -> None:
    node, _ = fleet
    limit, requests = 1000, 10_000
    async with visit(node) as operator:
        made = await operator.make("/keys", {"name": "limited"})
        await operator.make(
            "/limits",
            {"scope": "key", "subject_id": made["key"]["id"], "metric": "requests_per_minute", "value": limit},
        )
    statuses: list[int] = []
    answered_at = 0.0
    refused_from = 0.0
    async with customers(node, 60) as visitors:
        begun = time.monotonic()

        async def ask(visitor: Visitor) -> None:
            nonlocal answered_at, refused_from
            limited = visitor.as_other(made["secret"])
            while len(statuses) < requests:
                asked_at = time.monotonic()
                answer = await limited.ask("POST", CHAT, chat_body(MODEL, max_tokens=MAX_TOKENS))
                statuses.append(answer.status_code)
                answered_at = answered_at or time.monotonic()
                if answer.status_code == 429:
                    refused_from = max(refused_from, asked_at)

        await asyncio.gather(*(ask(visitor) for visitor in visitors))
        elapsed_s = time.monotonic() - begun
    assert set(statuses) == {200, 429}
    # The clock of the test goes from before the first request until after the last: at most that much comes in.
    assert limit <= statuses.count(200) <= limit + int(limit / 60 * elapsed_s) + 1
    # When the last refused one was asked for, or later, nothing was left of what had come in since the first answer.
    least = limit + int(limit / 60 * max(refused_from - answered_at, 0))
    assert statuses.count(200) >= least - 1 - limit / 60 * 1.0
