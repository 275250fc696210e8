"""Service accounts: identities of programs, each with one role in the organisation or in one project."""

import secrets
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Row, insert, select

from helixflow.auth.authority import check_held, check_role, check_unrestricted
from helixflow.auth.dispatch import Operation
from helixflow.auth.grants import permissions_of_role
from helixflow.auth.issuers import end_fallen
from helixflow.auth.keys import revoke_keys_of_owner
from helixflow.auth.paging import read_page
from helixflow.auth.projects import authorise_in
from helixflow.auth.texts import check_name
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_OWNER
from helixflow.storage.schema import service_accounts

_TARGET: Final = "service_account"


async def create_service_account(unit: Unit, request: pb.CreateServiceAccountRequest) -> pb.ServiceAccount:
    await authorise_in(unit, request.project_id)
    await check_unrestricted(unit)
    name = check_name(request.name)
    await check_role(unit, request.role, request.project_id)
    statement = insert(service_accounts).values(
        id=f"sa_{secrets.token_hex(12)}",
        organisation_id=unit.caller.organisation_id,
        project_id=request.project_id,
        name=name,
        role=request.role,
        created_at=unit.now,
        updated_at=unit.now,
        version=1,
    )
    row = (await unit.connection.execute(statement.returning(*service_accounts.c))).one()
    unit.record(_TARGET, row.id, after=_visible(row))
    return _message(row)


async def list_service_accounts(unit: Unit, request: pb.ListInProjectRequest) -> pb.ListServiceAccountsResponse:
    """Those of a project, or all that the caller may see."""
    query = select(service_accounts).where(
        service_accounts.c.organisation_id == unit.caller.organisation_id, service_accounts.c.deleted_at.is_(None)
    )
    if request.project_id:
        await authorise_in(unit, request.project_id)
        query = query.where(service_accounts.c.project_id == request.project_id)
    elif (visible := unit.authorise_some()) is not None:
        query = query.where(service_accounts.c.project_id.in_(sorted(visible)))
    rows, cursor = await read_page(
        unit.connection,
        query,
        (service_accounts.c.created_at, service_accounts.c.id),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    return pb.ListServiceAccountsResponse(service_accounts=map(_message, rows), next_cursor=cursor)


async def get_service_account(unit: Unit, request: pb.GetRequest) -> pb.ServiceAccount:
    return _message(await _find(unit, request.id))


async def update_service_account(unit: Unit, request: pb.UpdateServiceAccountRequest) -> pb.ServiceAccount:
    """Its keys do not work while it is suspended; what they may do follows its role."""
    row = await _find_changeable(unit, request.id, request.if_version)
    values: dict[str, Any] = {}
    if request.HasField("name"):
        values["name"] = check_name(request.name)
    if request.HasField("role"):
        await check_unrestricted(unit)
        await check_role(unit, request.role, row.project_id)
        values["role"] = request.role
    if request.HasField("suspended") and request.suspended != (row.suspended_at is not None):
        values["suspended_at"] = unit.now if request.suspended else None
    changed = await revise(unit, service_accounts, row, values)
    if changed is not row:
        unit.record(_TARGET, row.id, before=_visible(row), after=_visible(changed))
    if (changed.role, changed.suspended_at) != (row.role, row.suspended_at):
        await unit.change(CHANGE_KIND_OWNER, row.id, organisation_id=row.organisation_id)
        await end_fallen(unit, row.id, row.organisation_id)
    return _message(changed)


async def delete_service_account(unit: Unit, request: pb.DeleteRequest) -> pb.DeleteResponse:
    """Revokes its keys for good."""
    row = await _find_changeable(unit, request.id, request.if_version)
    await revise(unit, service_accounts, row, {"deleted_at": unit.now})
    revoked = await revoke_keys_of_owner(unit, row.id)
    await unit.change(CHANGE_KIND_OWNER, row.id, organisation_id=row.organisation_id)
    unit.record(_TARGET, row.id, before={**_visible(row), "keys": revoked})
    return pb.DeleteResponse()


OPERATIONS: Final[Mapping[str, Operation]] = {
    "CreateServiceAccount": Operation(create_service_account),
    "ListServiceAccounts": Operation(list_service_accounts),
    "GetServiceAccount": Operation(get_service_account),
    "UpdateServiceAccount": Operation(update_service_account),
    "DeleteServiceAccount": Operation(delete_service_account),
}


async def _find(unit: Unit, service_account_id: str) -> Row[Any]:
    """One of the caller's organisation, where the caller has the operation's permission in its project."""
    query = select(service_accounts).where(
        service_accounts.c.id == service_account_id,
        service_accounts.c.organisation_id == unit.caller.organisation_id,
        service_accounts.c.deleted_at.is_(None),
    )
    row = (await unit.connection.execute(query)).first()
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, "There is no such service account.", param="id")
    unit.authorise(row.project_id)
    return row


async def _find_changeable(unit: Unit, service_account_id: str, if_version: int) -> Row[Any]:
    """As `_find`, for one that may do nothing where it is that the caller may not: others are not theirs to change."""
    row = await _find(unit, service_account_id)
    check_version(row.version, if_version)
    held = await permissions_of_role(unit.connection, row.organisation_id, row.role)
    check_held(unit, held or frozenset(), row.project_id)
    return row


def _visible(row: Row[Any]) -> dict[str, Any]:
    return {
        "name": row.name,
        "project_id": row.project_id,
        "role": row.role,
        "suspended": row.suspended_at is not None,
    }


def _message(row: Row[Any]) -> pb.ServiceAccount:
    return pb.ServiceAccount(
        id=row.id,
        name=row.name,
        project_id=row.project_id,
        role=row.role,
        suspended=row.suspended_at is not None,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
    )
