"""Thousands of rows in one statement, past what SQLAlchemy does for each of them. The transaction is the caller's.

Rows are tuples of all columns of the table, in its order. Measured, 2,000 rows of 28 columns: 20 ms on SQLite; on
PostgreSQL 25 ms by COPY, 60 as arrays of one INSERT.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import msgspec
from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

Rows = Sequence[tuple[Any, ...]]

_POSTGRESQL: Final = "postgresql"
# In a statement of SQLite; any may have 32,766.
_VALUES_AT_ONCE: Final = 1_000


async def insert_rows(connection: AsyncConnection, table: Table, rows: Rows) -> None:
    """Raises `IntegrityError` for a row that is there already; the transaction, or its savepoint, must then end."""
    if not rows:
        return
    if connection.dialect.name == _POSTGRESQL:
        # The driver takes time to import, and most installations never need it.
        from helixflow.storage.copying import copy_rows

        await copy_rows(connection, table, rows)
    else:
        await _send(connection, table, rows, _inserting)


async def add_to_rows(connection: AsyncConnection, table: Table, rows: Rows) -> None:
    """Adds the numbers of each row to those of the row with the same primary key, or inserts it.

    All columns that are not of the primary key are such numbers; those of the key are numbers and text without NULs. No
    key comes twice in `rows`.
    """
    if not rows:
        return
    if connection.dialect.name == _POSTGRESQL:
        # COPY cannot add; by way of a temporary table it takes half as long again, arrays do as well.
        await connection.exec_driver_sql(_adding(table, _elements(table)), (msgspec.json.encode(rows).decode(),))
    else:
        await _send(connection, table, rows, _adding)


async def _send(connection: AsyncConnection, table: Table, rows: Rows, phrase: Callable[[Table, str], str]) -> None:
    """Some rows at a time, in one statement that takes less than the same for each of them: 22 ms instead of 29."""
    at_once = _VALUES_AT_ONCE // len(table.columns)
    whole = len(rows) - len(rows) % at_once
    if whole:
        parts = [tuple(chain.from_iterable(rows[begin : begin + at_once])) for begin in range(0, whole, at_once)]
        await connection.exec_driver_sql(phrase(table, _values(table, at_once)), parts)
    if whole < len(rows):
        await connection.exec_driver_sql(phrase(table, _values(table, 1)), list(rows[whole:]))


def _adding(table: Table, source: str) -> str:
    keys = [column.name for column in table.primary_key]
    sums = [column.name for column in table.columns if not column.primary_key]
    added = ", ".join(f"{name} = {table.name}.{name} + excluded.{name}" for name in sums)
    return f"{_inserting(table, source)} ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {added}"


def _inserting(table: Table, source: str) -> str:
    return f"INSERT INTO {table.name} ({', '.join(table.columns.keys())}) {source}"


@lru_cache(maxsize=16)
def _elements(table: Table) -> str:
    """The rows of an array of arrays, as JSON."""
    values = ", ".join(f"CAST(row ->> {index} AS {column.type})" for index, column in enumerate(table.columns))
    return f"SELECT {values} FROM jsonb_array_elements($1) AS element (row)"  # noqa: S608  (our own names)


@lru_cache(maxsize=16)
def _values(table: Table, rows: int) -> str:
    return "VALUES " + ", ".join([f"({', '.join('?' * len(table.columns))})"] * rows)
