"""Whose requests a caller may see."""

from collections.abc import Sequence

from sqlalchemy import select

from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.storage.schema import projects


async def visible_projects(unit: Unit, asked: Sequence[str]) -> frozenset[str] | None:
    """The projects whose usage the caller may see, None for the whole organisation; of `asked` if there are some.

    Deleted projects count: what was used there stays. Raises `HelixError` NOT_FOUND for what is no project of the
    caller's organisation, PERMISSION_DENIED.
    """
    visible = unit.authorise_some()
    if not asked:
        return visible
    own = projects.c.organisation_id == unit.caller.organisation_id
    known = {
        row.id for row in await unit.connection.execute(select(projects.c.id).where(own, projects.c.id.in_(asked)))
    }
    for project_id in asked:
        if project_id not in known:
            raise HelixError(ErrorKind.NOT_FOUND, f"There is no project {project_id!r}.", param="project_id")
        unit.authorise(project_id)
    return frozenset(asked)
