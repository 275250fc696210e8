"""The months of `requests` on PostgreSQL: each a partition; what belongs to none lies in the one without bounds."""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Self

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.storage.engine import Database

DEFAULT: Final = "requests_default"
# Made before they begin: this one and so many more.
_AHEAD: Final = 2
_NAME: Final = re.compile(r"requests_(\d{4})_(\d{2})")
# Where no clock can be right, rows stay in the partition without bounds.
_EARLIEST_YEAR: Final = 2020
# For a lock that keeps out readers: those that come meanwhile wait behind us.
_LOCK_TIMEOUT: Final = "SET LOCAL lock_timeout = 1000"

_PARTITIONS: Final = text(
    "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid WHERE inhparent = 'requests'::regclass"
)
_STRAYS: Final = text(f"SELECT DISTINCT admitted_at_ms / {86_400_000} FROM {DEFAULT}")  # noqa: S608  (our own names)

log = structlog.get_logger("helixflow.auth.ledger")


class Month(NamedTuple):
    """A month of the calendar, UTC; in the order of time."""

    year: int
    number: int

    @classmethod
    def at(cls, ms: int) -> Self:
        moment = datetime.fromtimestamp(ms / 1000, UTC)
        return cls(moment.year, moment.month)

    @classmethod
    def of_partition(cls, name: str) -> Self | None:
        """None for the partition without bounds, and for what an administrator made."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(int(match[1]), int(match[2]))

    @property
    def partition(self) -> str:
        return f"requests_{self.year:04d}_{self.number:02d}"

    @property
    def next(self) -> "Month":
        return Month(self.year + self.number // 12, self.number % 12 + 1)

    @property
    def begin_ms(self) -> int:
        return int(datetime(self.year, self.number, 1, tzinfo=UTC).timestamp()) * 1000


async def make_partitions(database: Database, now: int) -> Sequence[Month]:
    """Makes this month and the next two, and those whose rows have no partition yet; which were missing.

    Nothing on SQLite. For a chore, and once before the first shipment. `now` is seconds since the epoch. Raises
    `HelixError` while the database cannot be used, or readers are in the way.
    """
    wanted = [Month.at(now * 1000)]
    for _ in range(_AHEAD):
        wanted.append(wanted[-1].next)
    async with database.reading() as connection:
        if connection.dialect.name != "postgresql":
            return ()
        known = await list_partitions(connection)
        days = [row[0] for row in await connection.execute(_STRAYS)]
    strays = {Month.at(day * 86_400_000) for day in days if 0 < day <= now // 86_400 + 31}
    wanted += sorted(month for month in strays if month.year >= _EARLIEST_YEAR)
    missing = [month for month in dict.fromkeys(wanted) if month not in known]
    for month in missing:
        async with database.writing() as connection:
            await _make(connection, month)
    if missing:
        log.info("ledger.partitions_made", partitions=[month.partition for month in missing])
    return missing


async def list_partitions(connection: AsyncConnection) -> set[Month]:
    """The months that have a partition."""
    names: Iterable[str] = (row[0] for row in await connection.execute(_PARTITIONS))
    return {month for name in names if (month := Month.of_partition(name)) is not None}


async def drop_partition(connection: AsyncConnection, month: Month) -> None:
    """With its rows, at once; the transaction must be alone in writing."""
    await connection.execute(text(_LOCK_TIMEOUT))
    await connection.execute(text(f"DROP TABLE IF EXISTS {month.partition}"))


async def _make(connection: AsyncConnection, month: Month) -> None:
    """With the rows of that month that came before it. Alone in writing: nobody else makes it at the same time."""
    if month in await list_partitions(connection):
        return
    bounds = {"begin": month.begin_ms, "end": month.next.begin_ms}
    await connection.execute(text(_LOCK_TIMEOUT))
    await connection.execute(text(f"CREATE TABLE {month.partition} (LIKE requests)"))
    moved: Any = await connection.execute(
        text(
            f"WITH moved AS (DELETE FROM {DEFAULT}"  # noqa: S608  (our own names)
            " WHERE admitted_at_ms >= :begin AND admitted_at_ms < :end RETURNING *)"
            f" INSERT INTO {month.partition} SELECT * FROM moved"
        ),
        bounds,
    )
    await connection.execute(
        text(
            f"ALTER TABLE requests ATTACH PARTITION {month.partition}"
            f" FOR VALUES FROM ({bounds['begin']}) TO ({bounds['end']})"
        )
    )
    if moved.rowcount:
        log.info("ledger.rows_moved", partition=month.partition, rows=moved.rowcount)
