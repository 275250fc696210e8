"""The connection to the database: SQLite in WAL mode, one file under `data_dir`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from helixflow.core.errors import ExitCode, UserError
from helixflow.storage.failures import failures_for_callers, failures_for_people

FILE_NAME: Final = "helixflow.db"
BUSY_TIMEOUT_S: Final = 5.0
_WRITES: Final = "helixflow_writes"


class Database:
    """Transactions on one database. Failures of the database itself come out as `HelixError`."""

    def __init__(self, engine: AsyncEngine, path: Path) -> None:
        self.engine = engine
        self.path = path
        self._writer = writing_engine(engine)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A consistent view; nothing is written."""
        with failures_for_callers():
            async with self.engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is alone in writing from its first statement; committed unless the block raises."""
        with failures_for_callers():
            async with self._writer.begin() as connection:
                yield connection

    async def close(self) -> None:
        await self.engine.dispose()


def database_path(data_dir: Path) -> Path:
    return data_dir / FILE_NAME


def open_database(data_dir: Path) -> Database:
    """The database under `data_dir`, which is made when missing; the file has mode 0600.

    Touches the disk; raises `UserError` (STORAGE). Nothing is connected yet: `upgrade` it first.
    """
    path = database_path(data_dir)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(f"{data_dir}: cannot be used as data_dir: {exc.strerror}", ExitCode.STORAGE) from exc
    with failures_for_people(path):
        # SQLite gives its journal files the mode of the database.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    return Database(create_engine(path), path)


def create_engine(path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> AsyncEngine:
    """An engine on the SQLite file at `path`, with foreign keys enforced and transactions that SQLite really begins."""
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        connect_args={"timeout": busy_timeout_s},
        # Values are names and hashes of keys: they stay out of the text of errors.
        hide_parameters=True,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # Python's driver begins a transaction late and never for DDL; with this it leaves that to `begin` below.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # IMMEDIATE: a reader that turns writer cannot wait for another one and fails at once instead.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def writing_engine(engine: AsyncEngine) -> AsyncEngine:
    """The same engine, whose transactions take the write lock when they begin."""
    return engine.execution_options(**{_WRITES: True})
