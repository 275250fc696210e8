"""The end of projects and organisations, with all that is of use only there.

Rows stay where something refers to them for ever, as does the audit log of a deleted organisation.
"""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, delete, select, update

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.dispatch import Operation
from helixflow.auth.keys import revoke_keys_of_organisation, revoke_keys_of_project
from helixflow.auth.organisations import DEFAULT_ORGANISATION_ID, describe_organisation, find_own_organisation
from helixflow.auth.policy_tidying import drop_policies_of_ended
from helixflow.auth.projects import DEFAULT_PROJECT_ID, describe_project, find_project
from helixflow.auth.sessions import EndReason
from helixflow.auth.unit import Unit
from helixflow.auth.user_status import FORGOTTEN
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_ORGANISATION, CHANGE_KIND_PROJECT
from helixflow.storage.schema import (
    accounts,
    memberships,
    one_time_tokens,
    organisations,
    projects,
    recovery_codes,
    service_accounts,
    sessions,
)


async def delete_project(unit: Unit, request: pb.DeleteRequest) -> pb.DeleteResponse:
    """Revokes its keys, deletes its service accounts, ends invitations to it and takes its members' roles in it."""
    row = await find_project(unit, request.id)
    unit.authorise(row.id)
    check_version(row.version, request.if_version)
    if row.id == DEFAULT_PROJECT_ID:
        raise HelixError(ErrorKind.CONFLICT, "The first project cannot be deleted: the bootstrap key belongs to it.")
    # These include the keys of its service accounts, which can have none in other projects.
    await revoke_keys_of_project(unit, row.id)
    await _delete_service_accounts(unit, service_accounts.c.project_id == row.id)
    await unit.connection.execute(delete(memberships).where(memberships.c.project_id == row.id))
    unused = and_(one_time_tokens.c.project_id == row.id, one_time_tokens.c.used_at.is_(None))
    await unit.connection.execute(delete(one_time_tokens).where(unused))
    await revise(unit, projects, row, {"deleted_at": unit.now})
    await drop_policies_of_ended(unit.connection, unit.now)
    await unit.change(CHANGE_KIND_PROJECT, row.id, organisation_id=row.organisation_id)
    unit.record("project", row.id, before=describe_project(row))
    return pb.DeleteResponse()


async def delete_organisation(unit: Unit, request: pb.DeleteRequest) -> pb.DeleteResponse:
    """Ends its projects, keys, service accounts, sessions, invitations and memberships.

    Accounts whose home it is are forgotten, which frees their e-mails, except those that are members elsewhere: they go
    on, and nobody but their owners can change them any more.
    """
    row = await find_own_organisation(unit, request.id)
    check_version(row.version, request.if_version)
    if row.id == DEFAULT_ORGANISATION_ID:
        raise HelixError(ErrorKind.CONFLICT, "The first organisation cannot be deleted: the bootstrap key owns it.")
    await _forget_accounts(unit, row.id)
    await revoke_keys_of_organisation(unit, row.id)
    await _delete_service_accounts(unit, service_accounts.c.organisation_id == row.id)
    connection, gone = unit.connection, {"deleted_at": unit.now, "updated_at": unit.now}
    await connection.execute(delete(memberships).where(memberships.c.organisation_id == row.id))
    await connection.execute(delete(one_time_tokens).where(one_time_tokens.c.organisation_id == row.id))
    await connection.execute(
        update(sessions)
        .where(sessions.c.organisation_id == row.id, sessions.c.ended_at.is_(None))
        .values(ended_at=unit.now, end_reason=EndReason.DELETED.value)
    )
    await connection.execute(
        update(projects)
        .where(projects.c.organisation_id == row.id, projects.c.deleted_at.is_(None))
        .values(**gone, version=projects.c.version + 1)
    )
    await revise(unit, organisations, row, {"deleted_at": unit.now})
    await drop_policies_of_ended(unit.connection, unit.now)
    # One change for all of it: gateways forget every key of the organisation and refuse its tokens.
    await unit.change(CHANGE_KIND_ORGANISATION, row.id, organisation_id=row.id)
    for chain in (INSTALLATION, row.id):
        unit.record("organisation", row.id, before=describe_organisation(row), organisation_id=chain)
    return pb.DeleteResponse()


async def _forget_accounts(unit: Unit, organisation_id: str) -> None:
    """Those that will be members nowhere. Raises `HelixError` PERMISSION_DENIED when operators are among them, unless
    the caller is one.
    """
    elsewhere = select(memberships.c.account_id).where(memberships.c.organisation_id != organisation_id)
    doomed = and_(
        accounts.c.home_organisation_id == organisation_id,
        accounts.c.deleted_at.is_(None),
        accounts.c.id.not_in(elsewhere),
    )
    operators = select(accounts.c.id).where(doomed, accounts.c.operator).limit(1)
    if not unit.caller.operator and (await unit.connection.execute(operators)).first() is not None:
        raise HelixError(
            ErrorKind.PERMISSION_DENIED, "Not permitted: an operator of the installation belongs to this organisation."
        )
    version: dict[str, Any] = {"version": accounts.c.version + 1, "updated_at": unit.now, "deleted_at": unit.now}
    await unit.connection.execute(update(accounts).where(doomed).values(**FORGOTTEN, **version))
    # Ids may be too many for parameters: by now they are all that were ever deleted there.
    deleted = select(accounts.c.id).where(
        accounts.c.home_organisation_id == organisation_id, accounts.c.deleted_at.is_not(None)
    )
    await unit.connection.execute(delete(recovery_codes).where(recovery_codes.c.account_id.in_(deleted)))


async def _delete_service_accounts(unit: Unit, which: ColumnElement[bool]) -> None:
    await unit.connection.execute(
        update(service_accounts)
        .where(which, service_accounts.c.deleted_at.is_(None))
        .values(deleted_at=unit.now, updated_at=unit.now, version=service_accounts.c.version + 1)
    )


OPERATIONS: Final[Mapping[str, Operation]] = {
    "DeleteProject": Operation(delete_project),
    "DeleteOrganisation": Operation(delete_organisation),
}
