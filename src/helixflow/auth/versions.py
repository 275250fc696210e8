"""Updates of rows that carry a version: refused when somebody else was quicker, without trace when nothing changes."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, Table, and_, update

from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError


def check_version(stored: int, wanted: int) -> None:
    """Raises `HelixError` PRECONDITION_FAILED unless `wanted` is 0 (any) or what is stored."""
    if wanted not in (0, stored):
        raise HelixError(
            ErrorKind.PRECONDITION_FAILED, f"It has been changed meanwhile: its version is {stored}, not {wanted}."
        )


async def revise(unit: Unit, table: Table, row: Row[Any], values: Mapping[str, Any]) -> Row[Any]:
    """Gives `row` of `table` those values, the next version and the time; returns it as it then is.

    When it has them already it stays as it was, and `row` itself is returned.
    """
    changed = {name: value for name, value in values.items() if getattr(row, name) != value}
    if not changed:
        return row
    same = and_(*(column == getattr(row, column.name) for column in table.primary_key))
    statement = update(table).where(same).values(**changed, version=row.version + 1, updated_at=unit.now)
    return (await unit.connection.execute(statement.returning(*table.c))).one()
