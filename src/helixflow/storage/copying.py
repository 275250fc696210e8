"""PostgreSQL's COPY, which SQLAlchemy does not know: through the driver, in the transaction of a connection."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import Table
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection


async def copy_rows(connection: AsyncConnection, table: Table, rows: Any) -> None:
    """As `storage.bulk.insert_rows`. The transaction must have begun with a statement of its own."""
    async with _driver_of(connection) as driver:
        await driver.copy_records_to_table(table.name, records=rows, columns=table.columns.keys())


@asynccontextmanager
async def _driver_of(connection: AsyncConnection) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    """Its failures come out as those of SQLAlchemy."""
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    assert isinstance(driver, asyncpg.Connection)
    try:
        yield driver
    except asyncpg.IntegrityConstraintViolationError as exc:
        raise IntegrityError("COPY", None, exc, hide_parameters=True) from exc
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as exc:
        raise DBAPIError("COPY", None, exc, hide_parameters=True, connection_invalidated=driver.is_closed()) from exc
