"""Brings a database to the schema of this version, with the migrations that are part of the package."""

import asyncio
from typing import Final

import structlog
from alembic import command
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.tree import Settings
from helixflow.storage.engine import locate
from helixflow.storage.failures import Unreachable, failures_for_people
from helixflow.storage.location import Access
from helixflow.storage.revisions import alembic_config, refuse_newer

# How long a start waits for a PostgreSQL that is not up yet, seconds.
START_WAIT_S: Final = 30.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0

log = structlog.get_logger("helixflow.storage")


async def upgrade(settings: Settings, revision: str = "head", *, wait_s: float = START_WAIT_S) -> None:
    """Brings the database that the settings name up to `revision`, in one transaction: whole or not at all.

    Processes that do so at the same time wait for each other. Waits up to `wait_s` for a PostgreSQL that is not up yet.
    Raises `UserError` (STORAGE) when the database cannot be used, or was written by a newer version.
    """
    await _migrate(settings, revision, down=False, wait_s=wait_s)


async def downgrade(settings: Settings, revision: str) -> None:
    """Takes the database back to `revision` (`base`: empty). What newer tables held is lost. Raises as `upgrade`."""
    await _migrate(settings, revision, down=True, wait_s=0)


async def _migrate(settings: Settings, revision: str, *, down: bool, wait_s: float) -> None:
    location = await asyncio.to_thread(locate, settings)
    await asyncio.to_thread(location.prepare)
    engine = location.create_engine(migrating=True)
    try:
        with failures_for_people(location.name):
            await _wait_until_reachable(engine, location.name, wait_s)
            async with location.with_access(engine, Access.WRITING).begin() as connection:
                await connection.run_sync(_run, location.name, revision, down)
    finally:
        await engine.dispose()


async def _wait_until_reachable(engine: AsyncEngine, name: str, wait_s: float) -> None:
    """Raises the last `Unreachable` after `wait_s`, or at once where waiting cannot help."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    pause_s = _FIRST_PAUSE_S
    told = False
    while True:
        try:
            async with engine.connect():
                return
        except Unreachable as exc:
            if not exc.reason.passing or loop.time() + pause_s > deadline:
                raise
            if not told:
                log.warning("database.waiting", database=name, reason=exc.reason.text, wait_s=wait_s)
                told = True
        await asyncio.sleep(pause_s)
        pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)


def _run(connection: Connection, name: str, revision: str, down: bool) -> None:
    refuse_newer(connection, name)
    config = alembic_config()
    config.attributes["connection"] = connection
    try:
        (command.downgrade if down else command.upgrade)(config, revision)
    except CommandError as exc:
        raise UserError(f"{name}: {exc}", ExitCode.USAGE) from exc
    if connection.dialect.name == "sqlite":
        # Foreign keys were off, so that tables could be copied.
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            message = f"{name}: a row of {broken[0]} refers to one that is missing; restore a backup"
            raise UserError(message, ExitCode.STORAGE)
