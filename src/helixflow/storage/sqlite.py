"""SQLite in WAL mode: one file under `data_dir`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from helixflow.core.errors import ExitCode, UserError
from helixflow.storage.failures import failures_for_people
from helixflow.storage.location import ACCESS, LOCK_TIMEOUT_S, MIGRATION_LOCK_TIMEOUT_S, Access

FILE_NAME: Final = "helixflow.db"
# Each connection is a thread.
_POOL_SIZE: Final = 8
_POOL_TIMEOUT_S: Final = 5.0
_BEGIN: Final = {
    # A single SELECT sees one state anyway.
    Access.SINGLE: None,
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
    def remote(self) -> bool:
        return False

    def prepare(self) -> None:
        """Makes the folder (mode 0700) and the file (0600) when missing. Raises `UserError` (STORAGE)."""
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise UserError(f"{folder}: cannot be used as data_dir: {exc.strerror}", ExitCode.STORAGE) from exc
        with failures_for_people(self.name):
            # SQLite gives its journal files the mode of the database.
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
            finally:
                os.close(descriptor)

    def create_engine(self, *, migrating: bool = False) -> AsyncEngine:
        """Foreign keys enforced (unless `migrating`), and transactions that SQLite really begins."""
        lock_timeout_s = MIGRATION_LOCK_TIMEOUT_S if migrating else LOCK_TIMEOUT_S
        engine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(self.path)),
            connect_args={"timeout": lock_timeout_s if self.lock_timeout_s is None else self.lock_timeout_s},
            pool_size=_POOL_SIZE,
            max_overflow=0,
            pool_timeout=_POOL_TIMEOUT_S,
            # Values are names and hashes of keys: they stay out of the text of errors.
            hide_parameters=True,
        )

        @event.listens_for(engine.sync_engine, "connect")
        def prepare(connection: Any, _record: Any) -> None:
            # Python's driver begins a transaction late and never for DDL; with this it leaves that to `begin` below.
            connection.isolation_level = None
            cursor = connection.cursor()
            foreign_keys = "OFF" if migrating else "ON"
            for pragma in ("journal_mode = WAL", "synchronous = FULL", f"foreign_keys = {foreign_keys}"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Connection) -> None:
            statement = _BEGIN[connection.get_execution_options().get(ACCESS, Access.READING)]
            if statement is not None:
                connection.exec_driver_sql(statement)

        return engine

    def with_access(self, engine: AsyncEngine, access: Access) -> AsyncEngine:
        return engine.execution_options(**{ACCESS: access})
