"""What the two kinds of database have in common, as far as the rest of the room sees it."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final, Protocol

from sqlalchemy import Executable, Row
from sqlalchemy.ext.asyncio import AsyncEngine

# How long a statement waits for another process that writes, seconds.
LOCK_TIMEOUT_S: Final = 5.0
# How long a migration waits for another process that migrates, seconds.
MIGRATION_LOCK_TIMEOUT_S: Final = 60.0


class Access(Enum):
    """What a transaction is for."""

    # One view of everything.
    READING = "reading"
    # Alone in writing from the first statement.
    WRITING = "writing"


# The execution option that tells the listeners of an engine.
ACCESS: Final = "helixflow_access"

Parameters = Mapping[str, Any] | None


class Lookups(Protocol):
    """Single SELECTs outside transactions, in the cheapest way that the database has."""

    async def fetch_all(self, statement: Executable, parameters: Parameters) -> Sequence[Row[Any]]:
        """All rows. Fails as the driver does."""
        ...

    async def close(self) -> None:
        """Gives back what only look-ups use. Idempotent."""
        ...


class Location(Protocol):
    """Where a database is, and how to get there."""

    @property
    def name(self) -> str:
        """For messages: never a password."""
        ...

    @property
    def absent(self) -> bool:
        """Whether it is known, without asking anybody, that there is nothing yet."""
        ...

    def prepare(self) -> None:
        """Makes what must be there before anything connects. Touches the disk; raises `UserError`."""
        ...

    def create_engine(self, *, migrating: bool = False) -> AsyncEngine:
        """An engine whose transactions begin as `ACCESS` says. Connects to nothing yet.

        `migrating`: statements may take as long as they need, and SQLite's tables may be copied (no foreign keys).
        """
        ...

    def with_access(self, engine: AsyncEngine, access: Access) -> AsyncEngine:
        """The same engine and pool, for one kind of transaction."""
        ...

    def create_lookups(self, engine: AsyncEngine) -> Lookups:
        """Look-ups in the same database; may use the connections of `engine`."""
        ...
