"""Nothing that was admitted is lost or counted twice, whatever is killed; no request fails for want of a database."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import httpx2
import msgspec
import pytest

from benchmarks.load import http_request, measure_latency
from helixflow.metering.shipping.figures import read_status
from tests.harness.metering import (
    EVENTS_A_SECOND,
    MODEL,
    PACED_MODEL,
    SqliteLedger,
    chat_body,
    content_events,
    run_mock_node,
)
from tests.harness.node import CHAT, Node, eventually
from tests.harness.postgres import PostgresServer
from tests.harness.visitor import visit

GATEWAY = "helixflow.launch.gateway"
CONTROL = "helixflow.launch.control"
SHIPPER = "helixflow.launch.shipper"
CLIENTS = 8
LOST_S = 1.0
# How long requests are counted while the database is there.
CALM_S = 2.0
# Beyond what may be lost: a tick of the progress, and what was on its way to the client.
SLACK_S = 0.5


@pytest.fixture
def metered(tmp_path: Path) -> Iterator[Node]:
    with run_mock_node(tmp_path) as node:
        yield node


@dataclass
class Seen:
    """What one client saw of one request; `complete`: to its end."""

    request_id: str
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    complete: bool = False


class Clients:
    """Clients that stream without pause; a broken connection is the next request's beginning."""

    def __init__(self, node: Node, **fields: object) -> None:
        self._node = node
        self._body = chat_body(PACED_MODEL, stream=True, **fields)
        self.seen: list[Seen] = []

    @contextlib.asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._stream(number)) for number in range(CLIENTS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if not isinstance(result, asyncio.CancelledError):
                    raise result if isinstance(result, BaseException) else AssertionError(result)

    async def _stream(self, client: int) -> None:
        turn = 0
        async with visit(self._node) as visitor:
            while True:
                turn += 1
                seen = Seen(f"chaos-{client}-{turn}")
                self.seen.append(seen)
                headers = {"authorization": f"Bearer {visitor.credential}", "x-request-id": seen.request_id}
                try:
                    async with visitor.client.stream("POST", CHAT, json=self._body, headers=headers) as answer:
                        seen.status = answer.status_code
                        async for piece in answer.aiter_raw():
                            seen.body += piece
                    seen.complete = True
                except httpx2.TransportError:
                    await asyncio.sleep(0.01)


def check_books(ledger: SqliteLedger, seen: list[Seen]) -> None:
    """Each admitted request is there exactly once, with what its client got."""
    rows = ledger.rows()
    by_request = {row["request_id"]: row for row in rows}
    assert len(by_request) == len(rows), "no request twice"
    begun = [one for one in seen if one.status == 200]
    missing = [one.request_id for one in begun if one.request_id not in by_request]
    assert not missing, "what a client saw begin is in the ledger"
    for one in begun:
        row = by_request[one.request_id]
        received = content_events(bytes(one.body))
        if b"[DONE]" in one.body:
            assert row["outcome"] == "completed", "settled before the client saw the end"
            assert row["completion_tokens"] == 31, row
        else:
            lost = received - row["completion_tokens"]
            assert lost <= EVENTS_A_SECOND * (LOST_S + SLACK_S), row
    sums = {name: sum(row[name] for row in rows) for name in ("completion_tokens", "prompt_tokens", "cost")}
    for table in ("usage_hourly", "usage_daily"):
        rolled = ledger.rows(table)
        assert {name: sum(row[name] for row in rolled) for name in sums} == sums, table
        assert sum(row["requests"] for row in rolled) == len(rows)


async def kill_one(node: Node, module: str) -> None:
    """kill -9, and waits for its successor."""
    killed = node.find(module)
    killed.kill()

    def is_replaced() -> bool:
        with contextlib.suppress(ValueError):
            return bool(node.find(module).pid != killed.pid)
        return False

    await eventually(is_replaced)


async def until_shipped(node: Node, ledger: SqliteLedger, seen: list[Seen]) -> None:
    """Dead journals are closed; of the living one everything is in the ledger: the shipper says so."""
    begun = {one.request_id for one in seen if one.status == 200}

    def is_shipped() -> bool:
        status = read_status(node.data_dir / "run")
        if status is None or status.backlog_bytes or len(ledger.open_journals()) != 1:
            return False
        return begun <= {row["request_id"] for row in ledger.rows()}

    await eventually(is_shipped, 120)


async def test_a_gateway_killed_again_and_again_under_streams(metered: Node, rounds: int) -> None:
    ledger = SqliteLedger(metered.data_dir)
    clients = Clients(metered)
    pick = random.Random(rounds)
    async with clients.streaming():
        for _ in range(rounds):
            await asyncio.sleep(pick.uniform(0.2, 1.6))
            await kill_one(metered, GATEWAY)
            told = len(clients.seen)
            await eventually(lambda told=told: any(one.status == 200 for one in clients.seen[told:]), 60)
        await asyncio.sleep(0.5)
    await until_shipped(metered, ledger, clients.seen)
    check_books(ledger, clients.seen)
    outcomes = {row["outcome"] for row in ledger.rows()}
    assert "interrupted" in outcomes
    assert not list((metered.data_dir / "journal" / "quarantine").glob("*"))


async def test_shipper_and_control_killed_under_streams(metered: Node, rounds: int) -> None:
    """Neither is needed to answer, and what they were at is done again, once."""
    ledger = SqliteLedger(metered.data_dir)
    clients = Clients(metered)
    pick = random.Random(rounds)
    async with clients.streaming():
        for turn in range(max(rounds // 4, 4)):
            await asyncio.sleep(pick.uniform(0.1, 0.8))
            await kill_one(metered, CONTROL if turn % 2 else SHIPPER)
        await asyncio.sleep(0.5)
    assert {one.status for one in clients.seen if one.complete} == {200}
    await until_shipped(metered, ledger, clients.seen)
    check_books(ledger, clients.seen)


async def test_a_database_that_is_away_fails_no_request(
    tmp_path: Path, postgres_server: PostgresServer, outage_s: float
) -> None:
    rate = 500.0 if outage_s > 60 else 200.0
    with postgres_server.database() as url:
        database = postgres_server.settings(url, tmp_path / "postgres")
        settings = {
            "HELIXFLOW_DATABASE__URL": url,
            "HELIXFLOW_DATABASE__PASSWORD_FILE": str(database.password_file),
        }
        with run_mock_node(tmp_path, **settings) as node:
            request = http_request(node.port, msgspec.json.encode(chat_body()), node.key)
            before = (await measure_latency(node.port, request, rate, CALM_S)).answers
            gateway = node.find(GATEWAY)
            memory = gateway.memory_info().rss
            postgres_server.kill()
            tally = await measure_latency(node.port, request, rate, outage_s)
            await asyncio.to_thread(postgres_server.start)
            assert tally.problem in ("", "all connections busy"), "no failed request"
            assert tally.answers / outage_s >= 0.7 * before / CALM_S, "as many as with it"
            assert gateway.memory_info().rss - memory < 50 * 2**20
            owner = url.replace("://helixflow@", f"://helixflow:{postgres_server.role_password}@")
            await until_counted(owner, before + tally.answers)


async def until_counted(url: str, requests: int) -> None:
    """The ledger becomes complete, and not more than that."""
    connection = await asyncpg.connect(url)
    try:
        deadline = time.monotonic() + 180
        while (count := await connection.fetchval("SELECT count(*) FROM requests")) < requests:
            assert time.monotonic() < deadline, f"{count} of {requests}"
            await asyncio.sleep(0.1)
        assert count == requests
    finally:
        await connection.close()


async def test_a_client_that_leaves_is_settled_with_what_was_made(metered: Node) -> None:
    ledger = SqliteLedger(metered.data_dir)
    async with visit(metered) as visitor:
        headers = {"authorization": f"Bearer {visitor.credential}", "x-request-id": "leaves"}
        body = chat_body(PACED_MODEL, stream=True, max_tokens=1000)
        received = b""
        async with visitor.client.stream("POST", CHAT, json=body, headers=headers) as answer:
            async for piece in answer.aiter_raw():
                received += piece
                if content_events(received) >= 5:
                    break
        await eventually(lambda: ledger.count() == 1)
    (row,) = ledger.rows()
    assert (row["outcome"], row["status"], row["request_id"]) == ("cancelled", 499, "leaves")
    assert row["estimated"], "the provider had not said it yet"
    assert 5 <= row["completion_tokens"] < 1000
    assert row["prompt_tokens"] > 0
    assert row["model"] == PACED_MODEL != MODEL
