"""The versions of the serving configuration in the database. Rows are added, never changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import Row, Select, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.grants import Reader
from helixflow.auth.sealing import SealedColumn, Sealer
from helixflow.storage.schema import serving_configurations as table

Origin = Literal["file", "apply", "api", "rollback"]
_PURPOSE: Final = "serving configuration"
SEALED: Final = SealedColumn(table.c.document, _PURPOSE)
_NEWEST: Final = select(table).order_by(table.c.revision.desc()).limit(1)
# All but the document.
SUMMARIES: Final[Select[Any]] = select(*(column for column in table.columns if column is not table.c.document))


@dataclass(frozen=True, slots=True)
class Version:
    """One version. `document` is as it was given, see `settings.configuration`."""

    revision: int
    created_at: int
    actor_id: str
    actor_name: str
    origin: str
    note: str
    document: str


class History:
    """Reads and adds versions, on connections or lookups of the caller. Raises `HelixError`s of `storage`."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    async def newest(self, reader: Reader) -> Version | None:
        """The one in force; None before there was any."""
        return self._opened((await reader.execute(_NEWEST)).first())

    async def newest_of_file(self, reader: Reader) -> Version | None:
        """The last one that came from a configuration file."""
        return self._opened((await reader.execute(_NEWEST.where(table.c.origin == "file"))).first())

    async def find(self, reader: Reader, revision: int) -> Version | None:
        return self._opened((await reader.execute(select(table).where(table.c.revision == revision))).first())

    async def add(self, connection: AsyncConnection, version: Version) -> None:
        """Within a transaction that is alone in writing, which has seen that no version is as new."""
        values: Mapping[str, Any] = {
            name: getattr(version, name) for name in Version.__dataclass_fields__ if name != "document"
        }
        sealed = self._sealer.seal(_PURPOSE, version.document.encode(), str(version.revision))
        await connection.execute(insert(table).values(**values, document=sealed))

    def _opened(self, row: Row[Any] | None) -> Version | None:
        if row is None:
            return None
        document = self._sealer.open(_PURPOSE, row.document, str(row.revision)).decode()
        return Version(row.revision, row.created_at, row.actor_id, row.actor_name, row.origin, row.note, document)
