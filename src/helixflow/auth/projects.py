"""Projects: where keys, service accounts and members of an organisation are kept apart. `dissolution` deletes them."""

import secrets
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Row, insert, select

from helixflow.auth.dispatch import Operation
from helixflow.auth.paging import read_page
from helixflow.auth.texts import check_name
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.schema import projects

# Fixed: made once, found again. The bootstrap key belongs to it.
DEFAULT_PROJECT_ID: Final = "proj_default"
DEFAULT_PROJECT_NAME: Final = "Default"


async def find_project(unit: Unit, project_id: str, param: str = "id") -> Row[Any]:
    """A project of the caller's organisation. Raises `HelixError` NOT_FOUND, also for one of another organisation."""
    row = (
        await unit.connection.execute(
            select(projects).where(
                projects.c.id == project_id,
                projects.c.organisation_id == unit.caller.organisation_id,
                projects.c.deleted_at.is_(None),
            )
        )
    ).first()
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, f"There is no project {project_id!r}.", param=param)
    return row


async def authorise_in(unit: Unit, project_id: str, param: str = "project_id") -> None:
    """Checks the operation's permission in that project, or with '' in the organisation.

    Raises `HelixError` NOT_FOUND or PERMISSION_DENIED.
    """
    if project_id:
        await find_project(unit, project_id, param)
    unit.authorise(project_id)


async def insert_project(unit: Unit, organisation_id: str, name: str) -> Row[Any]:
    """A new project. The name is not checked."""
    statement = insert(projects).values(
        id=f"proj_{secrets.token_hex(12)}",
        organisation_id=organisation_id,
        name=name,
        created_at=unit.now,
        updated_at=unit.now,
        version=1,
    )
    return (await unit.connection.execute(statement.returning(*projects.c))).one()


async def create_project(unit: Unit, request: pb.CreateProjectRequest) -> pb.Project:
    await _check_name_is_free(unit, check_name(request.name))
    row = await insert_project(unit, unit.caller.organisation_id, request.name)
    unit.record("project", row.id, after=describe_project(row))
    return _message(row)


async def list_projects(unit: Unit, request: pb.ListRequest) -> pb.ListProjectsResponse:
    query = select(projects).where(
        projects.c.organisation_id == unit.caller.organisation_id, projects.c.deleted_at.is_(None)
    )
    readable = unit.authorise_some()
    if readable is not None:
        query = query.where(projects.c.id.in_(readable))
    rows, cursor = await read_page(
        unit.connection,
        query,
        (projects.c.created_at, projects.c.id),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    return pb.ListProjectsResponse(projects=map(_message, rows), next_cursor=cursor)


async def get_project(unit: Unit, request: pb.GetRequest) -> pb.Project:
    row = await find_project(unit, request.id)
    unit.authorise(row.id)
    return _message(row)


async def update_project(unit: Unit, request: pb.UpdateProjectRequest) -> pb.Project:
    row = await find_project(unit, request.id)
    unit.authorise(row.id)
    check_version(row.version, request.if_version)
    name = check_name(request.name) if request.HasField("name") else row.name
    if name != row.name:
        await _check_name_is_free(unit, name)
    after = await revise(unit, projects, row, {"name": name})
    if after is not row:
        unit.record("project", row.id, before=describe_project(row), after=describe_project(after))
    return _message(after)


async def _check_name_is_free(unit: Unit, name: str) -> None:
    found = await unit.connection.execute(
        select(projects.c.id).where(
            projects.c.organisation_id == unit.caller.organisation_id,
            projects.c.name == name,
            projects.c.deleted_at.is_(None),
        )
    )
    if found.first() is not None:
        raise HelixError(ErrorKind.CONFLICT, "There is a project of that name already.", param="name")


def describe_project(row: Row[Any]) -> dict[str, Any]:
    """What the audit log says of a project."""
    return {"name": row.name}


def _message(row: Row[Any]) -> pb.Project:
    return pb.Project(
        id=row.id,
        organisation_id=row.organisation_id,
        name=row.name,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
    )


OPERATIONS: Final[Mapping[str, Operation]] = {
    "CreateProject": Operation(create_project),
    "ListProjects": Operation(list_projects),
    "GetProject": Operation(get_project),
    "UpdateProject": Operation(update_project),
}
