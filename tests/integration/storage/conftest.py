"""Ways to look at a database past the code that is tested."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.settings.tree import Settings
from helixflow.storage.engine import locate
from helixflow.storage.location import Access

Sql = Callable[..., Awaitable[list[Any]]]
Look = Callable[[Callable[[Connection], Any]], Awaitable[Any]]


@asynccontextmanager
async def connect(settings: Settings) -> AsyncIterator[AsyncConnection]:
    """A transaction that is committed; SQLite does not check foreign keys in it."""
    location = locate(settings)
    location.prepare()
    engine = location.create_engine(migrating=True)
    try:
        async with location.with_access(engine, Access.WRITING).begin() as connection:
            yield connection
    finally:
        await engine.dispose()


@pytest.fixture
def sql(database_settings: Settings) -> Sql:
    """Runs one statement on the database of the test; gives the rows, where there are any."""

    async def run(statement: str, **values: object) -> list[Any]:
        async with connect(database_settings) as connection:
            result = await connection.execute(text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []

    return run


@pytest.fixture
def look(database_settings: Settings) -> Look:
    """Runs a function on a synchronous connection to the database of the test."""

    async def look(examine: Callable[[Connection], Any]) -> Any:
        async with connect(database_settings) as connection:
            return await connection.run_sync(examine)

    return look
