"""PostgreSQL: sessions with deadlines that depend on no default of the server, user or database."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
from sqlalchemy import Connection, Executable, Row, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from helixflow.storage.address import Address
from helixflow.storage.connector import Connector
from helixflow.storage.location import ACCESS, LOCK_TIMEOUT_S, MIGRATION_LOCK_TIMEOUT_S, Access, Parameters

_POOL_TIMEOUT_S: Final = 3.0
_PING_TIMEOUT_S: Final = 3.0
_STATEMENT_TIMEOUT_S: Final = 30.0
# Longer than the server's own limit: it counts only when the server says nothing at all any more.
_COMMAND_TIMEOUT_S: Final = 35.0
_IDLE_TRANSACTION_TIMEOUT_S: Final = 30.0
# A lost connection shows as closed, unless something between forgot it silently: after this time we ask.
_TRUSTED_IDLE_S: Final = 30.0
# A number that nobody else takes.
_WRITE_LOCK: Final = int.from_bytes(b"helixflo", "big")


@dataclass(frozen=True, slots=True)
class PostgresqlServer:
    """The database at `address`. `password` never shows, neither here nor in a message."""

    address: Address
    password: str = field(repr=False, default="")
    pool_size: int = 10
    lock_timeout_s: float | None = None

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def absent(self) -> bool:
        return False

    def prepare(self) -> None:
        """Nothing: whoever runs the server makes the database."""

    def create_engine(self, *, migrating: bool = False) -> AsyncEngine:
        engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._connector(migrating).connect,
            pool_size=1 if migrating else self.pool_size,
            max_overflow=0,
            pool_timeout=_POOL_TIMEOUT_S,
            hide_parameters=True,
        )

        @event.listens_for(engine.sync_engine, "checkin")
        def note_time(_connection: Any, record: Any) -> None:
            record.info["used_at"] = time.monotonic()

        @event.listens_for(engine.sync_engine, "checkout")
        def replace_lost(connection: Any, record: Any, _proxy: Any) -> None:
            # The pool answers this error with a fresh connection. Its own way, a ping each time, takes three messages.
            if connection.driver_connection.is_closed():
                raise DisconnectionError("closed while idle")
            used_at = record.info.get("used_at")
            if used_at is not None and time.monotonic() - used_at > _TRUSTED_IDLE_S:
                try:
                    connection.run_async(lambda driver: driver.execute("SELECT 1", timeout=_PING_TIMEOUT_S))
                except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as exc:
                    raise DisconnectionError("lost while idle") from exc

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Connection) -> None:
            if connection.get_execution_options().get(ACCESS) is Access.WRITING:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITE_LOCK})")

        return engine

    def with_access(self, engine: AsyncEngine, access: Access) -> AsyncEngine:
        match access:
            case Access.READING:
                return engine.execution_options(
                    **{ACCESS: access}, isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            case Access.WRITING:
                # Each statement sees what was committed before it: so all that was written before the lock came.
                return engine.execution_options(**{ACCESS: access}, isolation_level="READ COMMITTED")

    def create_lookups(self, engine: AsyncEngine) -> "PooledLookups":
        return PooledLookups(engine)

    def _connector(self, migrating: bool) -> Connector:
        lock_timeout_s = MIGRATION_LOCK_TIMEOUT_S if migrating else LOCK_TIMEOUT_S
        limits = {
            "lock_timeout": lock_timeout_s if self.lock_timeout_s is None else self.lock_timeout_s,
            "statement_timeout": 0.0 if migrating else _STATEMENT_TIMEOUT_S,
            # A process that hangs, or a machine that is gone, gives the write lock back.
            "idle_in_transaction_session_timeout": 0.0 if migrating else _IDLE_TRANSACTION_TIMEOUT_S,
        }
        session = {name: str(round(limit_s * 1000)) for name, limit_s in limits.items()}
        session |= {
            "application_name": "helixflow",
            "search_path": "public",
            "timezone": "UTC",
            "default_transaction_read_only": "off",
            "default_transaction_isolation": "read committed",
            "default_transaction_deferrable": "off",
            # Our queries are short.
            "jit": "off",
            "tcp_keepalives_idle": "15",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
        }
        command_timeout_s = None if migrating else _COMMAND_TIMEOUT_S
        return Connector(self.address, self.password, session, command_timeout_s=command_timeout_s)


class PooledLookups:
    """Look-ups on the connections of the pool, one message there and back: no BEGIN, no ROLLBACK."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def fetch_all(self, statement: Executable, parameters: Parameters) -> Sequence[Row[Any]]:
        """Asked again, on a fresh connection, when the first one turns out to be lost."""
        try:
            return await self._fetch_all(statement, parameters)
        except DBAPIError as exc:
            if not exc.connection_invalidated:
                raise
        return await self._fetch_all(statement, parameters)

    async def close(self) -> None:
        """The pool belongs to the engine."""

    async def _fetch_all(self, statement: Executable, parameters: Parameters) -> Sequence[Row[Any]]:
        async with self._engine.connect() as connection:
            return (await connection.execute(statement, parameters)).all()
