"""What is refused is recorded, or counted in a record; nobody who is refused waits for that or notices its failure."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from helixflow.auth.audit import refusals
from helixflow.auth.audit.entry import INSTALLATION, AuditEntry, Outcome
from helixflow.auth.audit.refusals import ACTION, COUNTED_FOR_S, MOST_SINGLE, Refusals
from helixflow.auth.caller import Caller, CallerKind
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.engine import Database
from tests.harness.auth import Installation, Person, refused


class Outage(Database):
    """A database that cannot be written to while `away`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.name = database.name
        self.away = False
        self.fetch_all = database.fetch_all  # type: ignore[method-assign]
        self.reading = database.reading  # type: ignore[method-assign]

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Any]:
        if self.away:
            raise HelixError(ErrorKind.UNAVAILABLE, "The database cannot be reached.")
        async with self._database.writing() as connection:
            yield connection


class Log:
    """Refusals alone, of callers by name."""

    def __init__(self, database: Database) -> None:
        self.database = Outage(database)
        self.clock = FakeClock()
        self.refusals = Refusals(self.database, self.clock)
        self.reader = Installation(database, self.clock)

    def note(self, caller: str, *targets: str, action: str = "get_key") -> None:
        for target in targets:
            who = Caller(CallerKind.KEY, caller, organisation_id="org_1")
            self.refusals.note(AuditEntry("org_1", who, action, "key", target, outcome=Outcome.DENIED, reason="x"))

    async def rows(self, chain: str = "org_1") -> list[Any]:
        return await self.reader.audited(chain)


@pytest.fixture
async def log(database: Database) -> AsyncIterator[Log]:
    log = Log(database)
    yield log
    await log.reader.close()


def counted(rows: list[Any]) -> list[tuple[str, int]]:
    return [(row.actor_id, json.loads(row.after)["count"]) for row in rows if row.action == ACTION]


async def caller_of(auth: Installation) -> Person:
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"})


async def test_a_refusal_does_not_wait_for_its_record(auth: Installation) -> None:
    """Somebody else, perhaps another process, holds the only place where one can write."""
    ada = await caller_of(auth)
    async with auth.database.writing(), asyncio.timeout(30), refused(ErrorKind.NOT_FOUND, "id"):
        await auth.call(ada, "GetKey", pb.GetRequest(id="key_of_somebody"))
    (record,) = await auth.audited(ada.organisation_id)
    assert (record.action, record.outcome, record.reason) == ("get_key", "denied", "not_found")
    assert (record.target_kind, record.target_id, record.actor_id) == ("key", "key_of_somebody", ada.id)


async def test_who_hangs_up_is_refused_on_record_all_the_same(auth: Installation) -> None:
    ada = await caller_of(auth)
    async with auth.database.writing():
        call = asyncio.create_task(auth.call(ada, "RevokeKey", pb.ChangeRequest(id="key_of_somebody")))
        async with asyncio.timeout(30):
            while not auth.dispatcher._writes:
                await asyncio.sleep(0.005)
        call.cancel()
        await asyncio.wait((call,))
    await auth.dispatcher.finish()
    (record,) = await auth.audited(ada.organisation_id)
    assert (record.action, record.outcome, record.target_id) == ("revoke_key", "denied", "key_of_somebody")


async def test_records_keep_the_order_and_the_time_of_the_refusals(log: Log) -> None:
    begun = int(log.clock.now())
    for number in range(5):
        log.note(f"key_{number % 2}", str(number))
        log.clock.advance(1)
    await log.refusals.write()
    assert [(row.target_id, row.at) for row in await log.rows()] == [(str(n), begun + n) for n in range(5)]


async def test_who_is_refused_all_the_time_gets_a_record_a_minute(log: Log) -> None:
    begun = int(log.clock.now())
    log.note("key_a", *map(str, range(MOST_SINGLE)))
    log.clock.advance(1)
    log.note("key_a", *["x"] * 900)
    log.note("key_a", *["x"] * 40, action="change_password")
    log.note("key_b", "mine")
    await log.refusals.write()
    rows = await log.rows()
    assert [row.target_id for row in rows] == [*map(str, range(MOST_SINGLE)), "mine"]
    log.clock.advance(COUNTED_FOR_S - 1)
    log.note("key_a", "x")
    await log.refusals.write()
    *before, last = await log.rows()
    assert before == rows
    assert (last.actor_kind, last.actor_id, last.action, last.outcome) == ("key", "key_a", ACTION, "denied")
    assert json.loads(last.after) == {
        "actions": [{"action": "change_password", "count": 40}, {"action": "get_key", "count": 901}],
        "count": 941,
        "since": begun + 1,
    }
    # A new minute.
    log.note("key_a", "again")
    await log.refusals.write()
    assert (await log.rows())[-1].target_id == "again"


async def test_while_the_database_is_away_refusals_wait_and_then_are_counted(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MOST_WAITING", 30)
    log.database.away = True
    for minute in range(3):
        for caller in range(10):
            log.note(f"key_{caller}", f"{minute}a", f"{minute}b")
        with pytest.raises(HelixError):
            await log.refusals.write()
        log.clock.advance(COUNTED_FOR_S)
    log.database.away = False
    await log.refusals.write()
    rows = await log.rows()
    single = [(row.actor_id, row.target_id) for row in rows if row.action != ACTION]
    first = [(f"key_{caller}", f"0{letter}") for caller in range(10) for letter in "ab"]
    assert single == [*first, *((f"key_{caller}", f"1{letter}") for caller in range(5) for letter in "ab")]
    assert sorted(counted(rows)) == [(f"key_{caller}", 2 if caller < 5 else 4) for caller in range(10)]
    assert len(single) + sum(count for _, count in counted(rows)) == 60


async def test_a_count_that_could_not_be_written_is_not_lost(log: Log) -> None:
    log.note("key_a", *["x"] * (MOST_SINGLE + 5))
    await log.refusals.write()
    log.clock.advance(COUNTED_FOR_S)
    log.database.away = True
    for _ in range(3):
        with pytest.raises(HelixError):
            await log.refusals.write()
        log.note("key_a", "x")
    log.database.away = False
    await log.refusals.write()
    assert counted(await log.rows()) == [("key_a", 8)]


async def test_more_callers_than_can_be_told_apart_are_counted_together(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MOST_CALLERS", 3)
    for caller in range(10):
        log.note(f"key_{caller}", "x", "y")
    log.clock.advance(COUNTED_FOR_S)
    await log.refusals.write()
    assert [row.actor_id for row in await log.rows()] == ["key_0"] * 2 + ["key_1"] * 2 + ["key_2"] * 2
    (others,) = await log.rows(INSTALLATION)
    assert (others.actor_kind, others.action, json.loads(others.after)["count"]) == ("system", ACTION, 14)


async def test_at_the_end_everything_is_written_or_what_is_lost_is_said(log: Log) -> None:
    log.note("key_a", *["x"] * (MOST_SINGLE + 5))
    await log.refusals.close()
    rows = await log.rows()
    assert (len(rows), counted(rows)) == (MOST_SINGLE + 1, [("key_a", 5)])
    log.database.away = True
    log.note("key_a", *["x"] * (MOST_SINGLE + 7))
    with capture_logs() as lines:
        await log.refusals.close()
    (line,) = lines
    assert (line["event"], line["count"]) == ("audit.refusals_lost", MOST_SINGLE + 7)
