"""Looks at a database without changing it: where its schema stands, and whether it is sound."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

from helixflow.settings.tree import Settings
from helixflow.storage.engine import locate
from helixflow.storage.failures import failures_for_people
from helixflow.storage.location import Access, Location
from helixflow.storage.revisions import current_revision, known_revisions
from helixflow.storage.schema import metadata

T = TypeVar("T")

_MOST_FINDINGS: Final = 20
# Alembic's names of differences, from the database to what the code expects.
_DIFFERENCES: Final = {
    "add_table": "the table {0.name} is missing",
    "add_index": "the index {0.name} is missing",
    "remove_index": "the index {0.name} is not of this schema",
    "add_constraint": "the constraint {0.name} is missing",
    "remove_constraint": "the constraint {0.name} is not of this schema",
    "add_fk": "the foreign key {0.name} is missing",
    "remove_fk": "the foreign key {0.name} is not of this schema",
    "add_column": "the column {1}.{2.name} is missing",
    "remove_column": "the column {1}.{2.name} is not of this schema",
    "modify_type": "the column {1}.{2} has the type {4}, not {5}",
    "modify_nullable": "the column {1}.{2} differs in whether it may be null",
    "modify_default": "the column {1}.{2} has another default",
}


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the database of that name stands. `revision` is None for an empty one; `newest` is this version's."""

    name: str
    revision: str | None
    newest: str

    @property
    def state(self) -> Literal["current", "older", "newer", "empty"]:
        if self.revision is None:
            return "empty"
        if self.revision == self.newest:
            return "current"
        return "older" if self.revision in known_revisions() else "newer"


async def find_standing(settings: Settings) -> Standing:
    """Raises `UserError` (STORAGE) when the database cannot be used."""
    location = await asyncio.to_thread(locate, settings)
    revision = None if location.absent else await _examine(location, current_revision)
    return Standing(location.name, revision, known_revisions()[0])


async def find_problems(settings: Settings) -> list[str]:
    """What is wrong with a database of this version's revision, a line each: pages, references, tables.

    Reads all of an SQLite file. Raises `UserError` (STORAGE) when the database cannot be used.
    """
    location = await asyncio.to_thread(locate, settings)
    return await _examine(location, lambda connection: list(_problems(connection)))


async def _examine(location: Location, examine: Callable[[Connection], T]) -> T:
    # An engine for migrations: what looks at everything may take long.
    engine = location.create_engine(migrating=True)
    try:
        with failures_for_people(location.name):
            async with location.with_access(engine, Access.READING).connect() as connection:
                return await connection.run_sync(examine)
    finally:
        await engine.dispose()


def _problems(connection: Connection) -> Iterator[str]:
    if connection.dialect.name == "sqlite":
        for (line,) in connection.exec_driver_sql(f"PRAGMA integrity_check({_MOST_FINDINGS})"):
            if line != "ok":
                yield f"damaged: {line}"
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(_MOST_FINDINGS)
        for table, row, parent, _ in broken:
            yield f"row {row} of {table} refers to a row of {parent} that is missing"
    options = {"include_object": _is_ours}
    for difference in compare_metadata(MigrationContext.configure(connection, opts=options), metadata):
        # Changes of one column come as a list.
        for single in difference if isinstance(difference, list) else [difference]:
            yield _describe(single)


def _is_ours(_item: Any, _name: str | None, kind: str, reflected: bool, expected: Any) -> bool:
    """Tables that others keep in the same database are not our business."""
    return not (kind == "table" and reflected and expected is None)


def _describe(difference: tuple[Any, ...]) -> str:
    """After its name a difference has the thing itself, or the schema and then table and column."""
    kind, *parts = difference
    return _DIFFERENCES.get(kind, f"the schema differs ({kind})").format(*parts)
