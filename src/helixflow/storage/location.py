"""What the two kinds of database have in common, as far as the rest of the room sees it."""

from enum import Enum
from typing import Final, Protocol

from sqlalchemy.ext.asyncio import AsyncEngine

# How long a statement waits for another process that writes, seconds.
LOCK_TIMEOUT_S: Final = 5.0
# How long a migration waits for another process that migrates, seconds.
MIGRATION_LOCK_TIMEOUT_S: Final = 60.0


class Access(Enum):
    """What a connection is for; an execution option of that name tells the engine's listeners."""

    # One SELECT outside a transaction.
    SINGLE = "single"
    # One view of everything.
    READING = "reading"
    # Alone in writing from the first statement.
    WRITING = "writing"


ACCESS: Final = "helixflow_access"


class Location(Protocol):
    """Where a database is, and how to get there."""

    @property
    def name(self) -> str:
        """For messages: never a password."""
        ...

    @property
    def remote(self) -> bool:
        """Whether it may come up later than we do."""
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
        """The same engine and pool, for one kind of access."""
        ...
