"""PostgreSQL's COPY, which SQLAlchemy does not know: through the driver, in the transaction of a connection."""

from typing import Any

import asyncpg
from sqlalchemy import Table
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection


async def copy_rows(connection: AsyncConnection, table: Table, rows: Any) -> None:
    """As `storage.bulk.insert_rows`. The transaction must have begun with a statement of its own."""
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    assert isinstance(driver, asyncpg.Connection)
    try:
        await driver.copy_records_to_table(table.name, records=rows, columns=table.columns.keys())
    except asyncpg.IntegrityConstraintViolationError as exc:
        raise IntegrityError("COPY", None, exc, hide_parameters=True) from exc
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as exc:
        raise DBAPIError("COPY", None, exc, hide_parameters=True, connection_invalidated=driver.is_closed()) from exc
