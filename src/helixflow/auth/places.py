"""Where an account signs in: one of its organisations, and a project there or none."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.grants import Held, grants_of_account
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import Permission
from helixflow.storage.schema import memberships, organisations, projects


@dataclass(frozen=True, slots=True)
class Place:
    """An organisation of which an account is a member, the project ('' for none), and what it may do there."""

    organisation_id: str
    project_id: str
    held: Held

    @property
    def permissions(self) -> frozenset[Permission]:
        return self.held.grants.within(self.project_id or None)


async def find_place(connection: AsyncConnection, account: Row[Any], organisation_id: str, project_id: str) -> Place:
    """The place that was asked for; by default the account's home, or where it became a member first, and there the
    oldest project in which it may use models.

    Raises `HelixError`: NOT_FOUND for an organisation or project that is not there or not for this account, which is
    the same; PERMISSION_DENIED when it is a member nowhere.
    """
    joined = await organisations_of(connection, account.id)
    if organisation_id and organisation_id not in joined:
        raise HelixError(ErrorKind.NOT_FOUND, "You are no member of such an organisation.", param="organisation_id")
    if not joined:
        raise HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: you are not a member of any organisation.")
    if not organisation_id:
        home = account.home_organisation_id
        organisation_id = home if home in joined else next(iter(joined))
    held = await grants_of_account(connection, account.id, organisation_id)
    if held is None:
        # Only of projects that are deleted.
        raise HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: you have no role in this organisation any more.")
    if not project_id:
        return Place(organisation_id, await _default_project(connection, organisation_id, held), held)
    own = projects.c.id == project_id
    if not held.grants.within(project_id) or await _oldest(connection, organisation_id, own) is None:
        raise HelixError(ErrorKind.NOT_FOUND, f"There is no project {project_id!r}.", param="project_id")
    return Place(organisation_id, project_id, held)


async def organisations_of(connection: AsyncConnection, account_id: str) -> dict[str, str]:
    """The names of the organisations in which an account has a role, by id, in the order in which it joined them."""
    rows = await connection.execute(
        select(organisations.c.id, organisations.c.name)
        .join(memberships, memberships.c.organisation_id == organisations.c.id)
        .where(memberships.c.account_id == account_id, organisations.c.deleted_at.is_(None))
        .order_by(memberships.c.created_at, organisations.c.id)
    )
    return {row.id: row.name for row in rows}


async def _default_project(connection: AsyncConnection, organisation_id: str, held: Held) -> str:
    if held.grants.allows(Permission.MODELS_USE):
        which: ColumnElement[bool] = true()
    else:
        usable = [
            project for project, permissions in held.grants.projects.items() if Permission.MODELS_USE in permissions
        ]
        which = projects.c.id.in_(usable)
    return await _oldest(connection, organisation_id, which) or ""


async def _oldest(connection: AsyncConnection, organisation_id: str, which: ColumnElement[bool]) -> str | None:
    query = (
        select(projects.c.id)
        .where(projects.c.organisation_id == organisation_id, projects.c.deleted_at.is_(None), which)
        .order_by(projects.c.created_at, projects.c.id)
        .limit(1)
    )
    return (await connection.execute(query)).scalar()
