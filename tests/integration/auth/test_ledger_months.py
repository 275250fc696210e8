"""The months of the ledger on PostgreSQL, and how single requests are forgotten on both kinds of database."""

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from helixflow.auth.chores import Chores
from helixflow.auth.ledger import retention
from helixflow.auth.ledger.ledger import Ledger
from helixflow.auth.ledger.partitions import Month, make_partitions
from helixflow.auth.ledger.retention import forget_requests, ledger_chores
from helixflow.auth.metering import MeteringService
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database
from helixflow.storage.inspection import find_problems
from helixflow.storage.schema import requests, usage_daily
from helixflow.storage.upgrade import downgrade, upgrade
from tests.harness.ledger import NOW, NOW_MS, check_sums, make_row, ship, total

DAY_S = 86_400
DAY_MS = DAY_S * 1000


async def partitions(database: Database) -> dict[str, int]:
    """Rows by partition; on SQLite there are none."""
    async with database.reading() as connection:
        if connection.dialect.name != "postgresql":
            return {}
        names = await connection.execute(
            text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'requests'::regclass")
        )
        return {
            name: (await connection.execute(text(f"SELECT count(*) FROM {name}"))).scalar_one() for (name,) in names
        }


def is_postgresql(settings: Settings) -> bool:
    return settings.database.url != "sqlite"


async def fill(database: Database, ages_days: list[int]) -> None:
    """One request for each age, counted from `NOW`."""
    rows = [
        (number, make_row(number, admitted_at_ms=NOW_MS - age * DAY_MS, tags={"age": str(age)}))
        for number, age in enumerate(ages_days, 1)
    ]
    await Ledger(database, FakeClock()).ship_records(ship(rows))


async def ages(database: Database) -> list[int]:
    rows = await database.fetch_all(select(requests.c.admitted_at_ms))
    return sorted((NOW_MS - row.admitted_at_ms) // DAY_MS for row in rows)


async def test_months_are_made_ahead_and_rows_find_them(database: Database, database_settings: Settings) -> None:
    made = await make_partitions(database, NOW)
    assert await make_partitions(database, NOW) in ([], ())
    await fill(database, [-80, -10, 0, 40])
    assert (await check_sums(database))[0] == 4
    assert await find_problems(database_settings) == []
    if not is_postgresql(database_settings):
        assert made == ()
        return
    assert made == [Month(2026, 11), Month(2026, 12), Month(2027, 1)]
    assert await partitions(database) == {
        "requests_2026_11": 1,
        "requests_2026_12": 1,
        "requests_2027_01": 0,
        "requests_default": 2,
    }
    # Those of months that should have one get it, with its rows; a clock in the future gets none.
    assert await make_partitions(database, NOW) == [Month(2026, 10)]
    assert (await partitions(database))["requests_2026_10"] == 1
    assert (await partitions(database))["requests_default"] == 1
    assert (await check_sums(database))[0] == 4
    # Exactly once also there.
    await fill(database, [-80, -10, 0, 40])
    assert (await check_sums(database))[0] == 4
    since = f"SELECT * FROM requests WHERE admitted_at_ms >= {Month(2026, 12).begin_ms}"
    plan = await database.fetch_all(text(f"EXPLAIN {since}"))
    assert "requests_2026_12" in str(plan)
    assert "requests_2026_11" not in str(plan)


async def test_months_are_made_before_anybody_ships(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where a reader is in the way: it must not keep the platform from starting."""
    await fill(database, [0])
    service = MeteringService(database_settings, database, FakeClock(float(NOW)))
    monkeypatch.setattr("helixflow.auth.ledger.partitions._LOCK_TIMEOUT", "SET LOCAL lock_timeout = 20")
    async with database.reading() as connection:
        await connection.execute(select(requests.c.call_id))
        await service.begin()
    assert await ages(database) == [0]
    await service.begin()
    if is_postgresql(database_settings):
        assert await partitions(database) == {
            "requests_2026_11": 1,
            "requests_2026_12": 0,
            "requests_2027_01": 0,
            "requests_default": 0,
        }


async def test_rows_that_came_before_their_month_move_into_it(database: Database, database_settings: Settings) -> None:
    await fill(database, [0, 1, 2])
    before = await total(database)
    await make_partitions(database, NOW)
    assert await total(database) == before
    if is_postgresql(database_settings):
        assert (await partitions(database))["requests_2026_11"] == 3
        assert (await partitions(database))["requests_default"] == 0


async def test_requests_are_forgotten_and_their_sums_are_not(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_BATCH", 2)
    everything = [0, 5, 29, 31, 60, 61, 62, 63, 90, 400]
    await fill(database, everything)
    await make_partitions(database, NOW)
    sums = await total(database, usage_daily)
    await forget_requests(database, NOW, 30)
    # Whole months: the one that holds the last day that is kept, October, stays on PostgreSQL.
    assert await ages(database) == ([0, 5, 29, 31] if is_postgresql(database_settings) else [0, 5, 29])
    assert await total(database, usage_daily) == sums
    await forget_requests(database, NOW, 30)
    assert await total(database, usage_daily) == sums
    # What comes late is stored, counts, and goes with the next turn.
    late = make_row(99, admitted_at_ms=NOW_MS - 100 * DAY_MS)
    await Ledger(database, FakeClock()).ship_records(ship([(500, late)]))
    assert 100 in await ages(database)
    await forget_requests(database, NOW, 30)
    assert 100 not in await ages(database)
    assert (await total(database, usage_daily))[0] == len(everything) + 1


async def test_the_chores_keep_the_ledger_in_order(database: Database, database_settings: Settings) -> None:
    await fill(database, [0, 100])
    clock = FakeClock(float(NOW))
    await Chores(ledger_chores(database, 30), clock).do_due()
    assert await ages(database) == [0]
    if is_postgresql(database_settings):
        assert "requests_2027_01" in await partitions(database)
    await fill(database, [0])
    await Chores(ledger_chores(database, 0), clock).do_due()
    assert await ages(database) == [0]


async def test_readers_in_the_way_put_it_off(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_postgresql(database_settings):
        return
    await fill(database, [100])
    await make_partitions(database, NOW)
    monkeypatch.setattr("helixflow.auth.ledger.partitions._LOCK_TIMEOUT", "SET LOCAL lock_timeout = 20")
    async with database.reading() as connection:
        await connection.execute(select(requests.c.call_id))
        with pytest.raises(HelixError) as caught:
            await forget_requests(database, NOW, 30)
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        await fill(database, [100, 0])
    await forget_requests(database, NOW, 30)
    assert await ages(database) == [0]


async def test_the_ledger_goes_down_and_up_again_with_its_months(
    database: Database, database_settings: Settings
) -> None:
    await fill(database, [0, 40])
    await make_partitions(database, NOW)
    await downgrade(database_settings, "0002")
    with pytest.raises(DBAPIError, match="requests"):
        await ages(database)
    await upgrade(database_settings)
    assert await find_problems(database_settings) == []
    await fill(database, [0, 40])
    assert await ages(database) == [0, 40]
