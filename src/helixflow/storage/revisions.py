"""The steps that this version knows, and where a database stands among them."""

from pathlib import Path
from typing import Final

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from helixflow.core.errors import ExitCode, UserError

_MIGRATIONS: Final = Path(__file__).parent / "migrations"


def alembic_config() -> Config:
    """Alembic's configuration; its commands look for an open `connection` in the `attributes`."""
    config = Config()
    # ConfigParser reads % as the start of an interpolation.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def known_revisions() -> list[str]:
    """All revisions of this version, newest first."""
    return [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()]


def current_revision(connection: Connection) -> str | None:
    """The revision of the database; None for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def refuse_newer(connection: Connection, name: str) -> None:
    """Raises `UserError` (STORAGE) for a database of a revision that this version does not know."""
    current = current_revision(connection)
    if current is not None and current not in known_revisions():
        message = (
            f"{name}: was written by a newer HelixFlow (schema {current}); "
            "upgrade HelixFlow, or restore a backup made before that"
        )
        raise UserError(message, ExitCode.STORAGE)
