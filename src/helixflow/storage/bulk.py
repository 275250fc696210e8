"""Thousands of rows in one statement, past what SQLAlchemy does for each of them. The transaction is the caller's.

Rows are tuples of all columns of the table, in its order. Measured, 2,000 rows of 28 columns: 20 ms on SQLite; on
PostgreSQL 25 ms by COPY, 60 as arrays of one INSERT.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

Rows = Sequence[tuple[Any, ...]]

_POSTGRESQL: Final = "postgresql"


async def insert_rows(connection: AsyncConnection, table: Table, rows: Rows) -> None:
    """Raises `IntegrityError` for a row that is there already; the transaction, or its savepoint, must then end."""
    if not rows:
        return
    if connection.dialect.name == _POSTGRESQL:
        # The driver takes time to import, and most installations never need it.
        from helixflow.storage.copying import copy_rows

        await copy_rows(connection, table, rows)
    else:
        await connection.exec_driver_sql(_inserting(table, _values(table)), list(rows))


async def add_to_rows(connection: AsyncConnection, table: Table, rows: Rows) -> None:
    """Adds the numbers of each row to those of the row with the same primary key, or inserts it.

    All columns that are not of the primary key are such numbers. No key comes twice in `rows`.
    """
    if not rows:
        return
    if connection.dialect.name == _POSTGRESQL:
        from helixflow.storage.copying import stage_rows

        staged = await stage_rows(connection, table, rows)
        await connection.exec_driver_sql(_adding(table, f"SELECT * FROM {staged}"))  # noqa: S608  (our own name)
    else:
        await connection.exec_driver_sql(_adding(table, _values(table)), list(rows))


@lru_cache(maxsize=16)
def _adding(table: Table, source: str) -> str:
    keys = [column.name for column in table.primary_key]
    sums = [column.name for column in table.columns if not column.primary_key]
    added = ", ".join(f"{name} = {table.name}.{name} + excluded.{name}" for name in sums)
    return f"{_inserting(table, source)} ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {added}"


def _inserting(table: Table, source: str) -> str:
    return f"INSERT INTO {table.name} ({', '.join(table.columns.keys())}) {source}"


def _values(table: Table) -> str:
    return f"VALUES ({', '.join('?' * len(table.columns))})"
