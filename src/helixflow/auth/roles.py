"""Roles: the built-in ones, and those that an organisation makes of permissions."""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Final

from sqlalchemy import Integer, Row, and_, delete, exists, insert, literal, or_, select, union_all

from helixflow.auth.authority import check_held, check_unrestricted
from helixflow.auth.dispatch import Operation
from helixflow.auth.grants import parse_scopes
from helixflow.auth.invitations import open_invitations
from helixflow.auth.paging import read_page
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import (
    INSTALLATION_PERMISSIONS,
    ROLE_DESCRIPTIONS,
    ROLES,
    Permission,
    parse_permission,
)
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.storage.schema import memberships, one_time_tokens, roles, service_accounts

MAX_DESCRIPTION_CHARS: Final = 500
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,49}")


async def create_role(unit: Unit, request: pb.CreateRoleRequest) -> pb.Role:
    name, description = _check_name(request.name), _check_description(request.description)
    permissions = _parse(request.permissions)
    check_held(unit, permissions, "")
    taken = select(roles.c.id).where(roles.c.organisation_id == unit.caller.organisation_id, roles.c.name == name)
    if name in ROLES or (await unit.connection.execute(taken)).first() is not None:
        raise HelixError(ErrorKind.CONFLICT, "There is a role of that name already.", param="name")
    statement = insert(roles).values(
        id=f"role_{secrets.token_hex(12)}",
        organisation_id=unit.caller.organisation_id,
        name=name,
        description=description,
        permissions=_stored(permissions),
        created_at=unit.now,
        updated_at=unit.now,
        version=1,
    )
    row = (await unit.connection.execute(statement.returning(*roles.c))).one()
    unit.record("role", row.id, after=_visible(row))
    return _message(row)


async def list_roles(unit: Unit, request: pb.ListRequest) -> pb.ListRolesResponse:
    """One list for the pages: built-in roles by rank, all others with the same one, by name."""
    mine = roles.c.organisation_id == unit.caller.organisation_id
    own_rank = len(ROLES)
    ranked = union_all(
        *(select(literal(rank, Integer).label("rank"), literal(name).label("name")) for rank, name in enumerate(ROLES)),
        select(literal(own_rank, Integer), roles.c.name).where(mine),
    ).subquery("ranked")
    columns = (roles.c[name] for name in ("id", "description", "permissions", "created_at", "updated_at", "version"))
    rows, cursor = await read_page(
        unit.connection,
        select(ranked.c.rank, ranked.c.name, *columns).outerjoin(
            roles, and_(mine, roles.c.name == ranked.c.name, ranked.c.rank == own_rank)
        ),
        (ranked.c.rank, ranked.c.name),
        page_size=request.page_size,
        cursor=request.cursor,
        descending=False,
    )
    listed = (_message(row) if row.rank == own_rank else _built_in(row.name) for row in rows)
    return pb.ListRolesResponse(roles=listed, next_cursor=cursor)


async def get_role(unit: Unit, request: pb.GetRequest) -> pb.Role:
    return _built_in(request.id) if request.id in ROLES else _message(await _find(unit, request.id))


async def update_role(unit: Unit, request: pb.UpdateRoleRequest) -> pb.Role:
    row = await _find(unit, request.id)
    check_version(row.version, request.if_version)
    check_held(unit, parse_scopes(row.permissions), "")
    values: dict[str, Any] = {}
    if request.HasField("description"):
        values["description"] = _check_description(request.description)
    if request.HasField("permissions"):
        await check_unrestricted(unit)
        permissions = _parse(request.permissions.values)
        check_held(unit, permissions, "")
        values["permissions"] = _stored(permissions)
    after = await revise(unit, roles, row, values)
    if after is not row:
        if after.permissions != row.permissions:
            organisation_id = unit.caller.organisation_id
            await unit.change(identity_pb2.CHANGE_KIND_ORGANISATION, organisation_id, organisation_id=organisation_id)
        unit.record("role", row.id, before=_visible(row), after=_visible(after))
    return _message(after)


async def delete_role(unit: Unit, request: pb.DeleteRequest) -> pb.DeleteResponse:
    row = await _find(unit, request.id)
    check_version(row.version, request.if_version)
    check_held(unit, parse_scopes(row.permissions), "")
    await _check_is_unused(unit, row.name)
    await unit.connection.execute(delete(roles).where(roles.c.id == row.id))
    unit.record("role", row.id, before=_visible(row))
    return pb.DeleteResponse()


async def _find(unit: Unit, role_id: str) -> Row[Any]:
    """One of the organisation's own roles. Raises `HelixError` CONFLICT for a built-in one, NOT_FOUND."""
    if role_id in ROLES:
        raise HelixError(ErrorKind.CONFLICT, "Built-in roles cannot be changed. Make one of your own.", param="id")
    own = and_(roles.c.id == role_id, roles.c.organisation_id == unit.caller.organisation_id)
    row = (await unit.connection.execute(select(roles).where(own))).first()
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, f"There is no role {role_id!r}.", param="id")
    return row


async def _check_is_unused(unit: Unit, name: str) -> None:
    organisation_id = unit.caller.organisation_id
    used = or_(
        exists().where(memberships.c.organisation_id == organisation_id, memberships.c.role == name),
        exists().where(
            service_accounts.c.organisation_id == organisation_id,
            service_accounts.c.role == name,
            service_accounts.c.deleted_at.is_(None),
        ),
        exists().where(open_invitations(organisation_id, unit.now), one_time_tokens.c.role == name),
    )
    if (await unit.connection.execute(select(used))).scalar_one():
        raise HelixError(
            ErrorKind.CONFLICT, "Members, service accounts or invitations have this role: change them first."
        )


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        message = "A role's name has 1 to 50 lower-case letters, digits, - and _, and begins with a letter."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="name")
    return name


def _check_description(text: str) -> str:
    if len(text) > MAX_DESCRIPTION_CHARS or not text.isprintable():
        message = f"A description has at most {MAX_DESCRIPTION_CHARS} printable characters."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="description")
    return text


def _parse(names: Iterable[str]) -> frozenset[Permission]:
    found = set()
    for index, name in enumerate(names):
        permission = parse_permission(name)
        if permission is None or permission in INSTALLATION_PERMISSIONS:
            message = "There is no such permission." if permission is None else "Only operators have this permission."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param=f"permissions[{index}]")
        found.add(permission)
    return frozenset(found)


def _stored(permissions: Iterable[Permission]) -> list[str]:
    return sorted(permission.value for permission in permissions)


def _visible(row: Row[Any]) -> dict[str, Any]:
    return {"name": row.name, "description": row.description, "permissions": row.permissions}


def _built_in(name: str) -> pb.Role:
    return pb.Role(
        id=name,
        name=name,
        description=ROLE_DESCRIPTIONS[name],
        permissions=_stored(ROLES[name]),
        built_in=True,
        version=1,
    )


def _message(row: Row[Any]) -> pb.Role:
    return pb.Role(
        id=row.id,
        name=row.name,
        description=row.description,
        permissions=row.permissions,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
    )


OPERATIONS: Final[Mapping[str, Operation]] = {
    "CreateRole": Operation(create_role),
    "ListRoles": Operation(list_roles),
    "GetRole": Operation(get_role),
    "UpdateRole": Operation(update_role),
    "DeleteRole": Operation(delete_role),
}
