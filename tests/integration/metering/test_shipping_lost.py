"""Journals whose folder is gone, closed in the real ledger: budgets load again, and what is known is charged."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from helixflow.auth.ledger.ledger import Ledger
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Settlement
from helixflow.metering.ledger_client import LedgerClient
from helixflow.metering.shipping import shipper as shipper_module
from helixflow.metering.shipping.closing import LostCall
from helixflow.metering.shipping.journal import Office
from helixflow.metering.shipping.shipper import Shipper
from helixflow.metering.spend import ABANDONED
from helixflow.rpc.channels import target_of
from helixflow.storage.engine import Database
from helixflow.storage.schema import journals, requests
from tests.harness.journals import WrittenJournal
from tests.harness.ledger import JOURNAL, NODE, NOW, NOW_MS, OTHER_JOURNAL, check_sums, make_row, ship
from tests.harness.ledger_service import LedgerService
from tests.harness.scripted_ledger import serving

ROWS = [(10 * number, make_row(number)) for number in range(1, 4)]


@dataclass
class Closer:
    """A limiter that outlives gateways and holds something for `held`; `failures` times it cannot be reached."""

    held: Sequence[LostCall] = ()
    failures: int = 0
    lost: list[str] = field(default_factory=list)

    async def settle(self, journal_id: str, settlements: Sequence[Settlement]) -> list[Settlement]:
        return []

    async def close(self, journal_id: str, settlements: Sequence[Settlement]) -> None:
        raise AssertionError("this journal is lost")

    async def list_lost(self, journal_id: str) -> list[LostCall]:
        return [] if journal_id in self.lost else list(self.held)

    async def close_lost(self, journal_id: str) -> None:
        if self.failures:
            self.failures -= 1
            raise HelixError(ErrorKind.INVALID_VALUE, "Not now.")
        self.lost.append(journal_id)


@dataclass
class Shop:
    """A node's shipper and the real ledger."""

    folder: Path
    database: Database
    ledger: Ledger
    client: LedgerClient

    @asynccontextmanager
    async def shipping(self, closer: Closer | None = None) -> AsyncIterator[None]:
        office = Office(NODE, self.client, closer, self.folder / "bad", 0.02, 600)
        task = asyncio.create_task(Shipper(self.folder / "journal", office).run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def closed(self, journal_id: str) -> None:
        """Returns once it is."""
        async with asyncio.timeout(60):
            while await self.is_open(journal_id):
                await asyncio.sleep(0.01)

    async def lose(self, journal_id: str = JOURNAL, node_id: str = NODE) -> None:
        """Has the ledger know `ROWS` of a journal that is nowhere."""
        shipment = ship(ROWS, journal_id=journal_id)
        shipment.node_id = node_id
        await self.ledger.ship_records(shipment)

    async def is_open(self, journal_id: str) -> bool:
        query = select(journals.c.closed_at).where(journals.c.id == journal_id)
        row = await self.database.fetch_one(query)
        return row is not None and row.closed_at is None


@pytest.fixture
async def shop(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    monkeypatch.setattr(shipper_module, "LOST_CHECK_S", 0.02)
    ledger = Ledger(database, FakeClock(float(NOW)))
    socket = tmp_path / "ledger.sock"
    options = [("grpc.default_authority", "localhost")]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(LedgerService(ledger), socket))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(target_of(socket), options=options))
        yield Shop(tmp_path, database, ledger, LedgerClient(channel))


def held(number: int, cost: int) -> LostCall:
    return LostCall(make_row(number).call_id, "org_1", "proj_1", "key_1", NOW_MS, cost)


async def test_a_lost_journal_that_had_shipped_something_is_closed(shop: Shop) -> None:
    here = WrittenJournal(shop.folder / "journal")
    await shop.lose()
    await shop.ledger.ship_records(ship([], journal_id=OTHER_JOURNAL, position=7))
    with capture_logs() as logs:
        async with shop.shipping():
            await shop.closed(JOURNAL)
            await shop.closed(OTHER_JOURNAL)
            assert await shop.is_open(here.id)
    assert [entry["known"] for entry in logs if entry["event"] == "journal.lost"] == [False, False]
    row = await shop.database.fetch_one(select(journals).where(journals.c.id == JOURNAL))
    assert row is not None
    assert (row.position, row.closed_at) == (30, NOW)
    here.die()


async def test_a_folder_that_somebody_removes_is_a_lost_journal(shop: Shop) -> None:
    journal = WrittenJournal(shop.folder / "journal")
    journal.write_call(1)
    closer = Closer()
    async with shop.shipping(closer):
        async with asyncio.timeout(60):
            while not await shop.database.fetch_all(select(requests)):
                await asyncio.sleep(0.01)
        journal.folder.rename(shop.folder / "moved")
        await shop.closed(journal.id)
    assert closer.lost == [journal.id]
    journal.die()


async def test_what_lost_calls_had_reserved_is_charged_once(shop: Shop) -> None:
    await shop.lose()
    # One of them had ended and was shipped; the first attempt to close it fails half way.
    closer = Closer([held(3, 500), held(4, 600), held(5, 700)], failures=1)
    async with shop.shipping(closer):
        await shop.closed(JOURNAL)
    assert closer.lost == [JOURNAL]
    assert await check_sums(shop.database) == (5, 0, 21, 6, 9, 3, 33 + 600 + 700)
    rows = await shop.database.fetch_all(select(requests).where(requests.c.outcome == "lost"))
    assert sorted((row.call_id, row.cost, row.organisation_id, row.project_id, row.key_id) for row in rows) == [
        (make_row(4).call_id, 600, "org_1", "proj_1", "key_1"),
        (make_row(5).call_id, 700, "org_1", "proj_1", "key_1"),
    ]
    assert {(row.prompt_tokens, row.completion_tokens, row.admitted_at_ms) for row in rows} == {(0, 0, NOW_MS)}


async def test_a_journal_that_was_given_up_is_closed_by_any_node(shop: Shop) -> None:
    await shop.lose(JOURNAL, "elsewhere")
    await shop.lose(OTHER_JOURNAL, "gone")
    async with shop.database.writing() as connection:
        await connection.execute(update(journals).where(journals.c.id == OTHER_JOURNAL).values(node_id=ABANDONED))
    closer = Closer()
    async with shop.shipping(closer):
        await shop.closed(OTHER_JOURNAL)
    assert closer.lost == [OTHER_JOURNAL]
    assert await shop.is_open(JOURNAL)
