"""What takes a user's sign-in away, and gives it back: suspension, reset, deletion, and the end of sessions.

All but the end of sessions is for the account's home organisation only and holds in all organisations. Who is suspended
or deleted leaves no open invitations and resets behind.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from sqlalchemy import Row, and_, delete, or_, select

from helixflow.auth.authority import (
    check_may_take_over,
    check_outranks,
    check_owner_remains,
    check_unrestricted,
)
from helixflow.auth.dispatch import Operation
from helixflow.auth.issuers import end_fallen
from helixflow.auth.keys import revoke_keys_of_owner
from helixflow.auth.one_time_tokens import Purpose
from helixflow.auth.paging import read_page
from helixflow.auth.sessions import EndReason, describe_session, end_sessions, is_open
from helixflow.auth.unit import Unit
from helixflow.auth.users import (
    describe_user,
    find_user,
    find_user_to_change,
    issue_reset,
    record_elsewhere,
    to_proto,
)
from helixflow.auth.versions import check_version, revise
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1 import sessions_pb2
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_OWNER
from helixflow.storage.schema import accounts, memberships, one_time_tokens, recovery_codes, sessions

_NO_SIGN_IN: Final[Mapping[str, Any]] = {"password_hash": None, "totp_secret": None, "totp_confirmed_at": None}
# What is left of an account that is deleted: its id.
FORGOTTEN: Final[Mapping[str, Any]] = {
    **_NO_SIGN_IN,
    "email": None,
    "email_key": None,
    "name": "",
    "operator": False,
    "last_login_at": None,
}


async def suspend_user(unit: Unit, request: pb.ChangeRequest) -> pb.User:
    """A second time changes nothing. Their keys do not work until they are reinstated."""
    row = await find_user_to_change(unit, request.id)
    check_version(row.version, request.if_version)
    if row.suspended_at is not None:
        return to_proto(row)
    await check_owner_remains(unit, row.id)
    await end_sessions(unit, row.id, None, EndReason.SUSPENDED)
    after = await _change(unit, row, {"suspended_at": unit.now})
    await end_fallen(unit, row.id)
    return to_proto(after)


async def reinstate_user(unit: Unit, request: pb.ChangeRequest) -> pb.User:
    """A second time changes nothing. Sessions stay ended."""
    row = await find_user_to_change(unit, request.id)
    check_version(row.version, request.if_version)
    if row.suspended_at is None:
        return to_proto(row)
    return to_proto(await _change(unit, row, {"suspended_at": None}))


async def reset_user(unit: Unit, request: pb.ChangeRequest, *, token_life_s: int) -> pb.ResetUserResponse:
    row = await find_user_to_change(unit, request.id)
    check_version(row.version, request.if_version)
    await check_unrestricted(unit)
    await check_may_take_over(unit, row)
    await end_sessions(unit, row.id, None, EndReason.PASSWORD)
    await unit.connection.execute(delete(recovery_codes).where(recovery_codes.c.account_id == row.id))
    after = await _change(unit, row, _NO_SIGN_IN)
    await record_elsewhere(unit, row, after)
    token, expires_at = await issue_reset(unit, row, token_life_s)
    return pb.ResetUserResponse(user=to_proto(after), token=token, token_expires_at=expires_at)


async def delete_user(unit: Unit, request: pb.DeleteRequest) -> pb.DeleteResponse:
    """The audit log says what they were, but for e-mail and name."""
    row = await find_user_to_change(unit, request.id)
    check_version(row.version, request.if_version)
    await check_owner_remains(unit, row.id)
    await end_sessions(unit, row.id, None, EndReason.DELETED)
    await revoke_keys_of_owner(unit, row.id)
    connection = unit.connection
    await connection.execute(delete(memberships).where(memberships.c.account_id == row.id))
    await connection.execute(delete(recovery_codes).where(recovery_codes.c.account_id == row.id))
    # Also the invitations that they came by, and those of this organisation that they could come back by.
    invited = and_(
        one_time_tokens.c.purpose == Purpose.INVITE.value,
        one_time_tokens.c.email_key == row.email_key,
        or_(
            one_time_tokens.c.used_at.is_not(None),
            one_time_tokens.c.organisation_id == unit.caller.organisation_id,
        ),
    )
    await connection.execute(delete(one_time_tokens).where(or_(one_time_tokens.c.account_id == row.id, invited)))
    await revise(unit, accounts, row, {**FORGOTTEN, "deleted_at": unit.now})
    await end_fallen(unit, row.id)
    await unit.change(CHANGE_KIND_OWNER, row.id)
    before = describe_user(row)
    unit.record("user", row.id, before={name: before[name] for name in ("status", "role", "operator")})
    return pb.DeleteResponse()


async def list_user_sessions(unit: Unit, request: pb.ListUserSessionsRequest) -> sessions_pb2.ListSessionsResponse:
    """Those in the caller's organisation that have not ended."""
    row = await find_user(unit, request.user_id, "user_id")
    rows, cursor = await read_page(
        unit.connection,
        select(sessions).where(
            sessions.c.account_id == row.id,
            sessions.c.organisation_id == unit.caller.organisation_id,
            is_open(unit.now),
        ),
        (sessions.c.created_at, sessions.c.id),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    found = (describe_session(session, unit.caller.session_id) for session in rows)
    return sessions_pb2.ListSessionsResponse(sessions=found, next_cursor=cursor)


async def end_user_sessions(unit: Unit, request: pb.EndUserSessionsRequest) -> pb.EndUserSessionsResponse:
    row = await find_user(unit, request.user_id, "user_id")
    await check_outranks(unit, row)
    ended = await end_sessions(unit, row.id, unit.caller.organisation_id, EndReason.REVOKED)
    unit.record("user", row.id, after={"sessions_ended": ended})
    return pb.EndUserSessionsResponse(ended=ended)


async def _change(unit: Unit, row: Row[Any], values: Mapping[str, Any]) -> Row[Any]:
    """Stores, records and tells the gateways a change that holds in all organisations."""
    await revise(unit, accounts, row, values)
    after = await find_user(unit, row.id)
    await unit.change(CHANGE_KIND_OWNER, row.id)
    unit.record("user", row.id, before=describe_user(row), after=describe_user(after))
    return after


def operations(token_life_s: int) -> Mapping[str, Operation]:
    """`token_life_s`: how long a token for a new password works."""
    return {
        "SuspendUser": Operation(suspend_user),
        "ReinstateUser": Operation(reinstate_user),
        "ResetUser": Operation(partial(reset_user, token_life_s=token_life_s)),
        "DeleteUser": Operation(delete_user),
        "ListUserSessions": Operation(list_user_sessions),
        "EndUserSessions": Operation(end_user_sessions),
    }
