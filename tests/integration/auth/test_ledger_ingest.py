"""Shipments into the ledger: each row exactly once, whatever comes twice, late or at the same time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from helixflow.auth.ledger import ingest
from helixflow.auth.ledger.ledger import Ledger
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.schema import journals, requests, usage_daily, usage_daily_tags, usage_hourly
from helixflow.storage.upgrade import upgrade
from tests.harness.ledger import JOURNAL, NODE, NOW, NOW_MS, OTHER_JOURNAL, check_sums, make_row, ship
from tests.harness.postgres import PostgresServer

ROWS = [(10 * number, make_row(number)) for number in range(1, 11)]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(float(NOW))


@pytest.fixture
def ledger(database: Database, clock: FakeClock) -> Ledger:
    return Ledger(database, clock)


@pytest.fixture
async def other(database: Database, database_settings: Settings) -> AsyncIterator[Database]:
    """The same database, as another control process has it."""
    other = open_database(database_settings)
    yield other
    await other.close()


async def test_a_row_is_stored_as_it_was_shipped(ledger: Ledger, database: Database) -> None:
    row = make_row(
        1,
        tags={"team": "Ärger", "job": "nightly"},
        user_id="user_1",
        outcome="interrupted",
        error="client_closed_request",
        status=499,
        estimated=True,
        stream=False,
        queue_ms=-1,
        cost=2**53,
        explanation='{"authorised_by":"key_1"}',
    )
    answer = await ledger.ship_records(ship([(5, row)], position=9))
    assert answer.position == 9
    stored = await database.fetch_one(select(requests))
    assert stored is not None
    assert stored._asdict() == {name: getattr(row, name) for name in row.__struct_fields__}


async def test_roll_ups_are_of_the_hour_and_day_of_admission_and_of_each_tag(
    ledger: Ledger, database: Database
) -> None:
    midnight_ms = (NOW // 86_400 + 1) * 86_400_000
    rows = [
        make_row(1, admitted_at_ms=midnight_ms - 1, outcome="failed", status=502),
        make_row(2, admitted_at_ms=midnight_ms, tags={"team": "a", "job": "x"}),
        make_row(3, admitted_at_ms=midnight_ms + 3_599_999, outcome="cancelled", tags={"team": "a"}),
        make_row(4, admitted_at_ms=midnight_ms + 3_600_000, outcome="lost", tags={"team": "b"}),
        make_row(5, admitted_at_ms=midnight_ms, key_id="key_2", outcome="interrupted"),
        make_row(6, admitted_at_ms=midnight_ms, key_id="key_2", operation="embeddings", tags={"team": "a"}),
    ]
    await ledger.ship_records(ship(list(enumerate(rows, 1))))
    midnight = midnight_ms // 1000

    def sums(requests: int, failed: int = 0) -> tuple[int, ...]:
        return (requests, failed, *(requests * each for each in (7, 2, 3, 1, 11)))

    rest = ("", "m", "m/llama_cpp-0", "chat/completions")
    embeddings = (*rest[:-1], "embeddings")
    hourly = [tuple(row) for row in await database.fetch_all(select(usage_hourly))]
    assert sorted(hourly) == [
        ("org_1", midnight - 3600, "proj_1", "key_1", *rest, *sums(1, 1)),
        ("org_1", midnight, "proj_1", "key_1", *rest, *sums(2)),
        ("org_1", midnight, "proj_1", "key_2", *rest, *sums(1)),
        ("org_1", midnight, "proj_1", "key_2", *embeddings, *sums(1)),
        ("org_1", midnight + 3600, "proj_1", "key_1", *rest, *sums(1)),
    ]
    daily = [tuple(row) for row in await database.fetch_all(select(usage_daily))]
    assert sorted(daily) == [
        ("org_1", midnight - 86_400, "proj_1", "key_1", *rest, *sums(1, 1)),
        ("org_1", midnight, "proj_1", "key_1", *rest, *sums(3)),
        ("org_1", midnight, "proj_1", "key_2", *rest, *sums(1)),
        ("org_1", midnight, "proj_1", "key_2", *embeddings, *sums(1)),
    ]
    tagged = [tuple(row) for row in await database.fetch_all(select(usage_daily_tags))]
    assert sorted(tagged) == [
        ("org_1", midnight, "job", "x", "proj_1", "key_1", *rest, *sums(1)),
        ("org_1", midnight, "team", "a", "proj_1", "key_1", *rest, *sums(2)),
        ("org_1", midnight, "team", "a", "proj_1", "key_2", *embeddings, *sums(1)),
        ("org_1", midnight, "team", "b", "proj_1", "key_1", *rest, *sums(1)),
    ]


async def test_tags_that_clients_choose_keep_no_journal_from_being_shipped(ledger: Ledger, database: Database) -> None:
    """NUL is nothing for PostgreSQL, nor are long keys for its indexes."""
    longest = "".join(map(chr, range(0x10000, 0x10000 + 512)))
    names = {"project_id": "p" * 64, "key_id": "k" * 64, "user_id": "u" * 64}
    names |= {"model": "m" * 200, "deployment": "d" * 220}
    row = make_row(1, tags={"t" * 64: longest, "n\0": "a\0b", "Ω" * 64: "漢" * 512}, **names)
    await ledger.ship_records(ship([(1, row)]))
    columns = usage_daily_tags.c
    found = {row.tag: row.tag_value for row in await database.fetch_all(select(columns.tag, columns.tag_value))}
    assert found == {"t" * 64: longest[:384], "n\ufffd": "a\ufffdb", "Ω" * 64: "漢" * 512}
    stored = await database.fetch_one(select(requests.c.tags))
    assert stored is not None
    assert stored.tags == row.tags


async def test_what_comes_again_or_overlaps_or_late_counts_once(ledger: Ledger, database: Database) -> None:
    for begin, end in ((0, 4), (0, 4), (2, 7), (0, 2), (5, 10), (0, 10)):
        answer = await ledger.ship_records(ship(ROWS[begin:end]))
    assert answer.position == 100
    assert await check_sums(database) == (10, 0, 70, 20, 30, 10, 110)
    assert (ledger.figures.rows, ledger.figures.duplicates) == (10, 0)


async def test_a_late_shipment_takes_the_position_not_back(ledger: Ledger, database: Database) -> None:
    await ledger.ship_records(ship(ROWS, position=170, quarantined=2))
    answer = await ledger.ship_records(ship(ROWS[:3], quarantined=1))
    assert answer.position == 170
    # What could not be read may be at the end, where the position does not move.
    answer = await ledger.ship_records(ship([], position=170, quarantined=3))
    assert answer.position == 170
    row = await database.fetch_one(select(journals))
    assert row is not None
    assert tuple(row) == (JOURNAL, NODE, 170, 5, NOW, NOW, None)
    assert ledger.figures.quarantined == 5


async def test_shipments_at_the_same_time_count_once(ledger: Ledger, database: Database, other: Database) -> None:
    """Of one journal (its shipper was replaced), and of another one through another control process."""
    second = Ledger(other, FakeClock(float(NOW)))
    others = [(position, make_row(position, project_id="proj_2")) for position in range(1000, 1050)]
    async with asyncio.TaskGroup() as tasks:
        for turn in range(5):
            tasks.create_task((ledger, second)[turn % 2].ship_records(ship(ROWS)))
            part = others[10 * turn : 10 * turn + 10]
            if turn == 0:
                # The order of a journal is its shipper's to keep.
                await second.ship_records(ship(others[:10], journal_id=OTHER_JOURNAL))
            tasks.create_task(second.ship_records(ship(others[: 10 * turn] + part, journal_id=OTHER_JOURNAL)))
            tasks.create_task(ledger.ship_records(ship(others, journal_id=OTHER_JOURNAL)))
    assert (await check_sums(database))[0] == 60
    assert ledger.figures.rows + second.figures.rows == 60


async def test_what_broke_off_is_completed_by_the_next_shipment(
    ledger: Ledger, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of the transaction: nothing of it is there, and the same shipment then brings all."""

    class Crash(Exception):
        pass

    async def crash(*_arguments: object, **_options: object) -> None:
        raise Crash

    await ledger.ship_records(ship(ROWS[:2]))
    before = await check_sums(database)
    for name in ("insert_rows", "add_to_rows", "advance_journal"):
        with monkeypatch.context() as patch:
            patch.setattr(ingest, name, crash)
            with pytest.raises(Crash):
                await ledger.ship_records(ship(ROWS))
        assert await check_sums(database) == before
        position = await database.fetch_one(select(journals.c.position))
        assert position is not None
        assert position[0] == 20
    await ledger.ship_records(ship(ROWS))
    assert (await check_sums(database))[0] == 10


async def test_rows_that_are_there_are_left_out_when_a_journal_was_restored(ledger: Ledger, database: Database) -> None:
    await ledger.ship_records(ship(ROWS[:6]))
    async with database.writing() as connection:
        await connection.execute(update(journals).values(position=0))
    await ledger.ship_records(ship(ROWS))
    assert (await check_sums(database))[0] == 10
    assert (ledger.figures.rows, ledger.figures.duplicates) == (10, 6)
    # The same under another name, and one of them twice.
    copy = [*ROWS, (110, ROWS[0][1]), (120, make_row(11)), (130, make_row(11))]
    await ledger.ship_records(ship(copy, journal_id=OTHER_JOURNAL))
    assert (await check_sums(database))[0] == 11
    assert ledger.figures.duplicates == 6 + 12


async def test_a_journal_is_opened_once_and_closed_once(ledger: Ledger, database: Database) -> None:
    opening = pb.OpenJournalRequest(journal_id=JOURNAL, node_id=NODE, opened_at_ms=NOW_MS - 5000)
    await ledger.open_journal(opening)
    await ledger.ship_records(ship(ROWS[:2]))
    await ledger.open_journal(pb.OpenJournalRequest(journal_id=JOURNAL, node_id="node_2", opened_at_ms=NOW_MS))
    row = await database.fetch_one(select(journals))
    assert row is not None
    assert tuple(row) == (JOURNAL, NODE, 20, 0, NOW - 5, NOW, None)
    for _ in range(2):
        answer = await ledger.ship_records(ship(ROWS[2:3], position=35, closes=True, quarantined=1))
        assert answer.position == 35
    row = await database.fetch_one(select(journals))
    assert row is not None
    assert tuple(row) == (JOURNAL, NODE, 35, 1, NOW - 5, NOW, NOW)
    for attempt in (ledger.ship_records(ship(ROWS[3:4])), ledger.open_journal(opening)):
        with pytest.raises(HelixError) as caught:
            await attempt
        assert (caught.value.kind, caught.value.param) == (ErrorKind.CONFLICT, "journal_id")
    assert (await check_sums(database))[0] == 3


async def test_a_journal_that_brought_nothing_can_be_closed(ledger: Ledger, database: Database) -> None:
    await ledger.open_journal(pb.OpenJournalRequest(journal_id=JOURNAL, node_id=NODE, opened_at_ms=NOW_MS))
    answer = await ledger.ship_records(ship([], position=0, closes=True))
    assert answer.position == 0
    row = await database.fetch_one(select(journals.c.closed_at))
    assert row is not None
    assert row[0] == NOW


async def test_whoever_watches_spend_hears_of_what_was_new_once_it_is_committed(database: Database) -> None:
    heard: list[frozenset[str]] = []
    ledger = Ledger(database, FakeClock(), heard.append)
    rows = [(1, make_row(1)), (2, make_row(2, organisation_id="org_2")), (3, make_row(3))]
    await ledger.ship_records(ship(rows))
    await ledger.ship_records(ship(rows))
    await ledger.ship_records(ship([*rows, (4, make_row(4, organisation_id="org_3"))]))
    await ledger.ship_records(ship([], position=5))
    assert heard == [frozenset({"org_1", "org_2"}), frozenset({"org_3"})]


@pytest.mark.parametrize(
    ("shipment", "param"),
    [
        (pb.ShipRecordsRequest(journal_id="A" * 24, node_id=NODE), "journal_id"),
        (pb.ShipRecordsRequest(journal_id=JOURNAL + "a", node_id=NODE), "journal_id"),
        (pb.ShipRecordsRequest(journal_id=JOURNAL, node_id="n" * 129), "node_id"),
        (pb.ShipRecordsRequest(journal_id=JOURNAL, node_id="a\nb"), "node_id"),
        (pb.ShipRecordsRequest(journal_id=JOURNAL, node_id=NODE, position=2**63), "position"),
        (pb.ShipRecordsRequest(journal_id=JOURNAL, node_id=NODE, quarantined=2**63), "quarantined"),
        (pb.ShipRecordsRequest(journal_id=JOURNAL, node_id=NODE, rows=b"\xff"), "rows"),
        (ship([(2, make_row(1)), (1, make_row(2))], position=5), "rows"),
        (ship([(2, make_row(1))], position=1), "position"),
        (ship([(2, make_row(1, request_id="a\0b"))]), "rows"),
    ],
)
async def test_what_is_no_shipment_is_refused_whole(
    ledger: Ledger, database: Database, shipment: pb.ShipRecordsRequest, param: str
) -> None:
    with pytest.raises(HelixError) as caught:
        await ledger.ship_records(shipment)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_VALUE, param)
    assert await database.fetch_all(select(journals)) == []


async def test_a_shipment_that_waits_too_long_comes_again(
    ledger: Ledger, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with database.writing():
        monkeypatch.setattr("helixflow.storage.engine.LOCK_TIMEOUT_S", 0.05)
        with pytest.raises(HelixError) as caught:
            await ledger.ship_records(ship(ROWS))
        assert caught.value.kind is ErrorKind.UNAVAILABLE
    await ledger.ship_records(ship(ROWS))
    assert (await check_sums(database))[0] == 10


@pytest.mark.parametrize("moment", ["insert_rows", "add_to_rows", "advance_journal"])
async def test_a_connection_lost_on_the_way_costs_nothing(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'helixflow'"
    step = getattr(ingest, moment)

    async def lose(*arguments: Any, **options: Any) -> None:
        await asyncio.to_thread(postgres_server.execute, ended)
        await step(*arguments, **options)

    with postgres_server.database() as url:
        settings = Settings(data_dir=tmp_path / "data", database=postgres_server.settings(url, tmp_path))
        await upgrade(settings)
        database = open_database(settings)
        try:
            ledger = Ledger(database, FakeClock(float(NOW)))
            with monkeypatch.context() as patch:
                patch.setattr(ingest, moment, lose)
                with pytest.raises(HelixError) as caught:
                    await ledger.ship_records(ship(ROWS))
            assert caught.value.kind is ErrorKind.UNAVAILABLE
            assert ledger.figures.rows == 0
            assert (await ledger.ship_records(ship(ROWS))).position == 100
            assert (await check_sums(database))[0] == 10
        finally:
            await database.close()
