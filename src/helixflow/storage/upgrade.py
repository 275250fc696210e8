"""Brings a database to the schema of this version, with the migrations that are part of the package."""

import asyncio
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from helixflow.core.errors import ExitCode, UserError
from helixflow.storage.engine import create_engine, writing_engine
from helixflow.storage.failures import failures_for_people

_MIGRATIONS = Path(__file__).parent / "migrations"


async def upgrade(path: Path, revision: str = "head") -> None:
    """Brings the SQLite database at `path` up to `revision`, in one transaction: whole or not at all.

    Raises `UserError` (STORAGE) when the file cannot be used, or was written by a newer version. Runs in a thread with
    an event loop of its own, since a migration may take long.
    """
    await asyncio.to_thread(lambda: asyncio.run(_migrate(path, revision, down=False)))


async def downgrade(path: Path, revision: str) -> None:
    """Takes the database at `path` back to `revision` (`base`: empty). What newer tables held is lost."""
    await asyncio.to_thread(lambda: asyncio.run(_migrate(path, revision, down=True)))


async def _migrate(path: Path, revision: str, *, down: bool) -> None:
    engine = create_engine(path)
    try:
        with failures_for_people(path):
            async with writing_engine(engine).begin() as connection:
                await connection.run_sync(_run, path, revision, down)
    finally:
        await engine.dispose()


def _run(connection: Connection, path: Path, revision: str, down: bool) -> None:
    config = Config()
    # ConfigParser reads % as the start of an interpolation.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    unknown = set(MigrationContext.configure(connection).get_current_heads()) - known
    if unknown:
        message = (
            f"{path}: was written by a newer HelixFlow (schema {', '.join(sorted(unknown))}); "
            "upgrade HelixFlow, or restore a backup made before that"
        )
        raise UserError(message, ExitCode.STORAGE)
    (command.downgrade if down else command.upgrade)(config, revision)
