"""SQLite in WAL mode: one file under `data_dir`."""

import asyncio
import os
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, Executable, Row, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from helixflow.core.errors import ExitCode, UserError
from helixflow.storage.failures import failures_for_people, reason_of
from helixflow.storage.location import ACCESS, LOCK_TIMEOUT_S, MIGRATION_LOCK_TIMEOUT_S, Access, Parameters

FILE_NAME: Final = "helixflow.db"
# Each connection is a thread.
_POOL_SIZE: Final = 8
_POOL_TIMEOUT_S: Final = 5.0
# Beside a second one that may be slow. More share Python's one lock: 172 µs a look-up with 1, 342 with 2, 732 with the
# asynchronous engine, which changes threads five times.
_LOOKUP_THREADS: Final = 2
# Between two attempts at what SQLite does not wait for, seconds.
_PAUSE_S: Final = 0.01
_BEGIN: Final = {
    Access.READING: "BEGIN",
    # A reader that turns writer cannot wait for another one and fails at once instead.
    Access.WRITING: "BEGIN IMMEDIATE",
}


@dataclass(frozen=True, slots=True)
class SqliteFile:
    """The file at `path`, whose folder is made when missing."""

    path: Path
    lock_timeout_s: float | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def absent(self) -> bool:
        return not self.path.exists()

    def prepare(self) -> None:
        """Makes the folder (mode 0700) and the file (0600, written ahead) when missing.

        Waits for whoever does so at the same time. Raises `UserError` (STORAGE).
        """
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise UserError(f"{folder}: cannot be used as data_dir: {exc.strerror}", ExitCode.STORAGE) from exc
        with failures_for_people(self.name):
            # A file that is there is not opened: closing it would drop the locks that this process holds on it.
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            # SQLite gives its journal files the mode of the database.
            self.path.chmod(self.path.stat().st_mode & 0o700)
            with closing(sqlite3.connect(self.path, timeout=0, isolation_level=None)) as connection:
                _log_ahead(connection, self._lock_timeout_s())

    def create_engine(self, *, migrating: bool = False) -> AsyncEngine:
        """Foreign keys enforced (unless `migrating`), and transactions that SQLite really begins."""
        engine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(self.path)),
            connect_args={"timeout": self._lock_timeout_s(migrating)},
            pool_size=_POOL_SIZE,
            max_overflow=0,
            pool_timeout=_POOL_TIMEOUT_S,
            # Values are names and hashes of keys: they stay out of the text of errors.
            hide_parameters=True,
        )

        _prepare_connections(engine.sync_engine, foreign_keys=not migrating)

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(_BEGIN[connection.get_execution_options().get(ACCESS, Access.READING)])

        return engine

    def _lock_timeout_s(self, migrating: bool = False) -> float:
        if self.lock_timeout_s is not None:
            return self.lock_timeout_s
        return MIGRATION_LOCK_TIMEOUT_S if migrating else LOCK_TIMEOUT_S

    def with_access(self, engine: AsyncEngine, access: Access) -> AsyncEngine:
        return engine.execution_options(**{ACCESS: access})

    def create_lookups(self, engine: AsyncEngine) -> "ThreadedLookups":
        return ThreadedLookups(self.path)


class ThreadedLookups:
    """Whole look-ups in few threads, on connections of their own."""

    def __init__(self, path: Path) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, "lookup")
        self._engine = create_engine(
            URL.create("sqlite+pysqlite", database=str(path)),
            connect_args={"timeout": LOCK_TIMEOUT_S, "check_same_thread": False},
            pool_size=_LOOKUP_THREADS,
            max_overflow=0,
            hide_parameters=True,
        )
        # Never begun explicitly: each SELECT is on its own.
        _prepare_connections(self._engine, foreign_keys=True)

    async def fetch_all(self, statement: Executable, parameters: Parameters) -> Sequence[Row[Any]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._fetch_all, statement, parameters)

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        self._engine.dispose()

    def _fetch_all(self, statement: Executable, parameters: Parameters) -> Sequence[Row[Any]]:
        with self._engine.connect() as connection:
            return connection.execute(statement, parameters).all()


def _log_ahead(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Turns the write-ahead log on, which stays with the file.

    SQLite does not wait by itself for another connection that is about to do the same.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            reason = reason_of(exc)
            if reason is None or not reason.passing or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


def _prepare_connections(engine: Engine, *, foreign_keys: bool) -> None:
    pragmas = ("synchronous = FULL", f"foreign_keys = {'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # Python's driver begins a transaction late and never for DDL; with this it leaves that to us.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
