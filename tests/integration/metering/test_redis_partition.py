"""A gateway that dies while Redis is out of its reach, its journal cut all the time: all of it is counted."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from helixflow.core.clock import SystemClock
from helixflow.metering.admission import Demand, Grant, Settlement
from helixflow.metering.journal.acknowledged import read_acknowledged, write_acknowledged
from helixflow.metering.journal.segments import list_segments
from helixflow.metering.ledger_client import LedgerClient
from helixflow.metering.policies import Budget, Period, Policies, Scope, Unit
from helixflow.metering.redis.closing import RedisJournalCloser
from helixflow.metering.redis.redis_limiter import RedisLimiter
from helixflow.metering.shipping.journal import Office
from helixflow.metering.shipping.shipper import Shipper
from helixflow.rpc.channels import target_of
from tests.harness.journals import WrittenJournal, admitted, call_id, settled
from tests.harness.partition import Way
from tests.harness.redis import RedisServer
from tests.harness.scripted_ledger import ScriptedLedger, serving
from tests.harness.spending import ORGANISATION, Ledger

CAP = 10_000_000
BOUND = 1_000
SEGMENT_BYTES = 8 * 1024
POLICIES = Policies((), (Budget("b1", ORGANISATION, Scope.ORGANISATION, ORGANISATION, Unit.MONEY, Period.TOTAL, CAP),))


@pytest.fixture
def server(redis_server: RedisServer) -> Iterator[RedisServer]:
    redis_server.start()
    redis_server.flush()
    yield redis_server
    redis_server.start()
    redis_server.resume()


class Gateway:
    """A limiter and a journal on the disk, as one gateway has them. `cost` is what its calls have cost."""

    def __init__(self, server: RedisServer, port: int, root: Path) -> None:
        self.journal = WrittenJournal(root, SEGMENT_BYTES)
        self._loads = Ledger()
        self._loads.positions[self.journal.id] = 0
        self.limiter = RedisLimiter(
            server.settings(url=f"redis://127.0.0.1:{port}", lease_per_mille=10, timeout_s=1),
            self._loads,
            SystemClock(),
            journal_id=self.journal.id,
            position=lambda: self._settled_to,
            acknowledge=partial(write_acknowledged, self.journal.folder),
        )
        self._settled_to = 0
        self._number = 0
        self._grants: dict[str, Grant] = {}
        self._task = asyncio.create_task(self.limiter.run())
        self.cost = 0

    async def admit(self, policies: Policies = POLICIES) -> str:
        self._number += 1
        call = call_id(self._number)
        now_ms = int(SystemClock().now() * 1000)
        deadline = asyncio.get_running_loop().time() + 60
        demand = Demand(call, ORGANISATION, policies, 0, 0, BOUND, now_ms, deadline)
        grant = self.limiter.try_admit(demand) or await self.limiter.admit(demand)
        record = admitted(call, organisation_id=ORGANISATION, holds=grant.holds, admitted_at_ms=now_ms)
        self.journal.write(record)
        self._grants[call] = grant
        return call

    def settle(self, call: str, cost: int) -> None:
        self._settled_to = self.journal.write(settled(call, cost))
        self.cost += cost
        holds = self._grants.pop(call).holds
        self.limiter.settle(Settlement(call, ORGANISATION, holds, 8, cost, self._settled_to))

    async def fill_segments(self) -> None:
        """With calls that nothing is counted for."""
        for _ in range(200):
            self.settle(await self.admit(Policies((), ())), 0)

    async def die(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.journal.die()


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[ScriptedLedger]:
    ledger = ScriptedLedger()
    async with serving(ledger, tmp_path / "ledger.sock"):
        yield ledger


@pytest.fixture
async def shipper(server: RedisServer, ledger: ScriptedLedger, tmp_path: Path) -> AsyncIterator[None]:
    options = [("grpc.default_authority", "localhost")]
    async with grpc.aio.insecure_channel(target_of(tmp_path / "ledger.sock"), options=options) as channel:
        closer = RedisJournalCloser(server.settings())
        office = Office("00112233aabbccdd", LedgerClient(channel), closer, tmp_path / "bad", 0.02, 600)
        task = asyncio.create_task(Shipper(tmp_path / "journal", office).run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("shipper")
async def test_nothing_is_cut_that_redis_may_not_know(
    server: RedisServer, ledger: ScriptedLedger, tmp_path: Path
) -> None:
    async with Way(server.port) as way:
        gateway = Gateway(server, way.port, tmp_path / "journal")
        folder = gateway.journal.folder
        for _ in range(20):
            gateway.settle(await gateway.admit(), 7)
        running = [await gateway.admit() for _ in range(20)]
        gateway.settle(running.pop(), 5)
        await until(lambda: gateway.limiter.figures.leases)
        # What Redis knows is cut, also what is before the ends of calls that run.
        await gateway.fill_segments()
        for call in running[:10]:
            gateway.settle(call, 300)
        await until(lambda: read_acknowledged(folder) > SEGMENT_BYTES)

        way.cut()
        await until(lambda: gateway.limiter.figures.away)
        for call in running[10:]:
            gateway.settle(call, 900)
        on_lease = [await gateway.admit() for _ in range(10)]
        for call in on_lease[:8]:
            gateway.settle(call, 600)
        await gateway.fill_segments()
        for call in on_lease[8:]:
            gateway.settle(call, 600)
        await gateway.fill_segments()
        await ledger.until(lambda: sum(row.cost for row in ledger.rows) == gateway.cost)
        await until(lambda: list_segments(folder)[0][0] > 0)
        assert gateway.limiter.figures.fallbacks >= 10

        await gateway.die()
        await until(lambda: not folder.exists())
    assert fields(server) == (gateway.cost, 0)
    assert gateway.cost == 20 * 7 + 5 + 10 * 300 + 9 * 900 + 10 * 600


@pytest.mark.usefixtures("shipper")
async def test_once_redis_is_back_the_journal_is_cut_again(
    server: RedisServer, ledger: ScriptedLedger, tmp_path: Path
) -> None:
    async with Way(server.port) as way:
        gateway = Gateway(server, way.port, tmp_path / "journal")
        running = await gateway.admit()
        await until(lambda: gateway.limiter.figures.leases)
        way.cut()
        await until(lambda: gateway.limiter.figures.away)
        gateway.settle(running, 5)
        gateway.settle(await gateway.admit(), 6)
        await gateway.fill_segments()
        way.heal()
        await until(lambda: gateway.limiter.figures.joins >= 2)
        await until(lambda: len(list_segments(gateway.journal.folder)) == 1)
        assert fields(server)[0] == gateway.cost == 11
        await gateway.die()
        await until(lambda: not gateway.journal.folder.exists())
    assert fields(server) == (11, 0)


def fields(server: RedisServer) -> tuple[int, int]:
    """What the budget has spent, and what is reserved."""
    with server.client() as client:
        epoch: Any = client.hget("hf:epoch", "id")
        keys: Any = client.keys(b"hf:" + epoch + b":*:b:*")
        [values] = [client.hmget(key, "spent", "reserved") for key in keys]
    spent, reserved = (int(value or 0) for value in values)  # type: ignore[union-attr]
    return spent, reserved


async def until(condition: Callable[[], object]) -> None:
    """For what nothing announces."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)
