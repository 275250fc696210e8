"""Single SELECTs outside of any transaction: for what must be quick, or is not worth one."""

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Executable, Row

from helixflow.auth.grants import Rows
from helixflow.storage.engine import Database


class Lookups:
    """A `Reader` (see `grants`). Nothing holds between two of its SELECTs. Raises `HelixError`s of `storage`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def execute(self, statement: Executable, parameters: dict[str, Any] | None = None, /) -> Rows:
        return _Found(await self._database.fetch_all(statement, parameters))


class _Found:
    def __init__(self, rows: Sequence[Row[Any]]) -> None:
        self._rows = rows

    def first(self) -> Row[Any] | None:
        return self._rows[0] if self._rows else None

    def __iter__(self) -> Iterator[Row[Any]]:
        return iter(self._rows)
