"""Members: which role a user has in the organisation, and in single projects beyond it.

Without a role in the organisation or in any project a user can do nothing there; their sessions in it and their keys
then end for good. What they issued ends as soon as they could not issue it any more (`issuers`).
"""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Row, and_, delete, insert, select

from helixflow.auth.authority import check_outranks, check_owner_remains, check_role, check_unrestricted
from helixflow.auth.dispatch import Operation
from helixflow.auth.issuers import end_fallen
from helixflow.auth.keys import revoke_keys_of_owner
from helixflow.auth.paging import read_page
from helixflow.auth.projects import authorise_in
from helixflow.auth.sessions import EndReason, end_sessions
from helixflow.auth.unit import Unit
from helixflow.auth.users import find_user
from helixflow.auth.versions import check_version, revise
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import OWNER
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.storage.schema import accounts, memberships


async def list_members(unit: Unit, request: pb.ListMembersRequest) -> pb.ListMembersResponse:
    await authorise_in(unit, request.project_id)
    rows, cursor = await read_page(
        unit.connection,
        _members(unit, request.project_id),
        (memberships.c.created_at, memberships.c.account_id),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    return pb.ListMembersResponse(members=map(_message, rows), next_cursor=cursor)


async def set_member(unit: Unit, request: pb.SetMemberRequest) -> pb.Member:
    place = request.project_id
    await authorise_in(unit, place)
    await check_unrestricted(unit)
    user = await find_user(unit, request.user_id, "user_id")
    await check_outranks(unit, user, place)
    await check_role(unit, request.role, place)
    row = await _find(unit, user.id, place)
    check_version(row.version if row is not None else 0, request.if_version)
    if row is not None and row.role == request.role:
        return _message(row)
    if row is None:
        await unit.connection.execute(
            insert(memberships).values(
                account_id=user.id,
                organisation_id=unit.caller.organisation_id,
                project_id=place,
                role=request.role,
                created_at=unit.now,
                updated_at=unit.now,
                version=1,
            )
        )
    else:
        if not place and row.role == OWNER:
            await check_owner_remains(unit, user.id, unit.caller.organisation_id)
        await revise(unit, memberships, row, {"role": request.role})
    after = await _find(unit, user.id, place)
    assert after is not None
    await _tell(unit, user.id)
    await end_fallen(unit, user.id, unit.caller.organisation_id)
    unit.record("member", user.id, before=_visible(row) if row is not None else None, after=_visible(after))
    return _message(after)


async def remove_member(unit: Unit, request: pb.RemoveMemberRequest) -> pb.DeleteResponse:
    """Takes that one role: a user without a role in the organisation may still have some in projects."""
    place = request.project_id
    await authorise_in(unit, place)
    user = await find_user(unit, request.user_id, "user_id")
    row = await _find(unit, user.id, place)
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, "This user is no member there.", param="user_id")
    check_version(row.version, request.if_version)
    await check_outranks(unit, user, place)
    if not place and row.role == OWNER:
        await check_owner_remains(unit, user.id, unit.caller.organisation_id)
    here = and_(memberships.c.account_id == user.id, memberships.c.organisation_id == unit.caller.organisation_id)
    await unit.connection.execute(delete(memberships).where(here, memberships.c.project_id == place))
    before = _visible(row)
    left = await unit.connection.execute(select(memberships.c.project_id).where(here).limit(1))
    if left.first() is None:
        await end_sessions(unit, user.id, unit.caller.organisation_id, EndReason.REVOKED)
        before["keys"] = await revoke_keys_of_owner(unit, user.id, unit.caller.organisation_id)
    await _tell(unit, user.id)
    await end_fallen(unit, user.id, unit.caller.organisation_id)
    unit.record("member", user.id, before=before)
    return pb.DeleteResponse()


async def _tell(unit: Unit, account_id: str) -> None:
    await unit.change(identity_pb2.CHANGE_KIND_OWNER, account_id, organisation_id=unit.caller.organisation_id)


async def _find(unit: Unit, account_id: str, project_id: str) -> Row[Any] | None:
    query = _members(unit, project_id).where(memberships.c.account_id == account_id)
    row: Row[Any] | None = (await unit.connection.execute(query)).first()
    return row


def _members(unit: Unit, project_id: str) -> Any:
    return (
        select(memberships, accounts.c.email, accounts.c.name)
        .join(accounts, accounts.c.id == memberships.c.account_id)
        .where(memberships.c.organisation_id == unit.caller.organisation_id, memberships.c.project_id == project_id)
    )


def _visible(row: Row[Any]) -> dict[str, Any]:
    return {"project_id": row.project_id, "role": row.role}


def _message(row: Row[Any]) -> pb.Member:
    return pb.Member(
        user_id=row.account_id,
        email=row.email,
        name=row.name,
        project_id=row.project_id,
        role=row.role,
        created_at=row.created_at,
        version=row.version,
    )


OPERATIONS: Final[Mapping[str, Operation]] = {
    "ListMembers": Operation(list_members),
    "SetMember": Operation(set_member),
    "RemoveMember": Operation(remove_member),
}
