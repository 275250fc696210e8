"""Forgets single requests when their time has come; what they add up to stays for ever."""

from typing import Final

import structlog
from sqlalchemy import text

from helixflow.auth.chores import Chore
from helixflow.auth.ledger.partitions import DEFAULT, drop_partition, list_partitions, make_partitions
from helixflow.storage.engine import Database

_DAY_S: Final = 86_400
# In one transaction: others wait for it.
_BATCH: Final = 1_000

# A call's id begins with the moment at which it was made, a little before its admission: the primary key finds them.
_SQLITE_BATCH: Final = text(
    "DELETE FROM requests WHERE rowid IN (SELECT rowid FROM requests"
    " WHERE call_id < :first_id AND admitted_at_ms < :before_ms ORDER BY call_id LIMIT :most)"
)
# Few rows, if any: of clocks that were wrong.
_DEFAULT_BATCH: Final = text(
    f"DELETE FROM {DEFAULT} WHERE ctid IN"  # noqa: S608  (our own names)
    f" (SELECT ctid FROM {DEFAULT} WHERE admitted_at_ms < :before_ms LIMIT :most)"
)

log = structlog.get_logger("helixflow.auth.ledger")


def ledger_chores(database: Database, retention_days: int) -> tuple[Chore, ...]:
    """What the ledger must have done now and then; `retention_days` 0 keeps requests for ever."""
    chores = [Chore("ledger partitions", 3600, lambda now: make_partitions(database, now))]
    if retention_days:
        chores.append(Chore("ledger retention", 3600, lambda now: forget_requests(database, now, retention_days)))
    return tuple(chores)


async def forget_requests(database: Database, now: int, retention_days: int) -> None:
    """Forgets requests that were admitted more than so many days before `now` (seconds since the epoch).

    On PostgreSQL by whole months, once all of one is that old. Raises `HelixError` while the database cannot be used.
    """
    before_ms = (now - retention_days * _DAY_S) * 1000
    async with database.reading() as connection:
        partitioned = connection.dialect.name == "postgresql"
        months = sorted(await list_partitions(connection)) if partitioned else []
    for month in months:
        if month.next.begin_ms <= before_ms:
            async with database.writing() as connection:
                await drop_partition(connection, month)
            log.info("ledger.month_forgotten", partition=month.partition)
    # 48 bits of milliseconds, in hexadecimal digits.
    values = {"before_ms": before_ms, "most": _BATCH} | ({} if partitioned else {"first_id": f"{before_ms:012x}"})
    while True:
        async with database.writing() as connection:
            deleted = await connection.execute(_DEFAULT_BATCH if partitioned else _SQLITE_BATCH, values)
        if deleted.rowcount < _BATCH:
            return
