"""Invitations: a role for whoever has the token, under one e-mail.

The answer is the same, after the same work, whether or not the e-mail has an account in another organisation: only
members of the caller's own are looked at. Inviting the same e-mail to the same place again ends the earlier invitation.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, and_, delete, select

from helixflow.auth.authority import check_role, check_unrestricted
from helixflow.auth.dispatch import Operation
from helixflow.auth.one_time_tokens import Purpose, issue
from helixflow.auth.paging import read_page
from helixflow.auth.projects import authorise_in
from helixflow.auth.texts import check_email, email_key
from helixflow.auth.unit import Unit
from helixflow.auth.versions import check_version
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.schema import accounts, memberships, one_time_tokens

# They never change.
_VERSION: Final = 1


def open_invitations(organisation_id: str, now: int) -> ColumnElement[bool]:
    """The rows of `one_time_tokens` that somebody may still redeem to become a member of that organisation."""
    return and_(
        one_time_tokens.c.organisation_id == organisation_id,
        one_time_tokens.c.purpose == Purpose.INVITE.value,
        one_time_tokens.c.used_at.is_(None),
        one_time_tokens.c.expires_at > now,
    )


async def invite(
    unit: Unit, organisation_id: str, email: str, role: str, project_id: str = "", *, token_life_s: int
) -> tuple[pb.Invitation, str]:
    """A new invitation and its token; an earlier one of the same e-mail to the same place ends, and is recorded.

    Nothing is checked here.
    """
    for row in await _earlier(unit, organisation_id, email, project_id):
        await unit.connection.execute(delete(one_time_tokens).where(one_time_tokens.c.id == row.id))
        before = describe_invitation(_message(row))
        unit.record("invitation", row.id, before=before, organisation_id=organisation_id, action="revoke_invitation")
    token_id, token = await issue(
        unit,
        Purpose.INVITE,
        organisation_id=organisation_id,
        life_s=token_life_s,
        project_id=project_id,
        email=email,
        role=role,
    )
    row = (await unit.connection.execute(select(one_time_tokens).where(one_time_tokens.c.id == token_id))).one()
    return _message(row), token


async def invite_user(unit: Unit, request: pb.InviteUserRequest, *, token_life_s: int) -> pb.InviteUserResponse:
    organisation_id, place = unit.caller.organisation_id, request.project_id
    await authorise_in(unit, place)
    await check_unrestricted(unit)
    email = check_email(request.email)
    await check_role(unit, request.role, place)
    # The new invitation ends them, which only who could have made them may do.
    for row in await _earlier(unit, organisation_id, email, place):
        await check_role(unit, row.role, row.project_id)
    if await is_member(unit, organisation_id, email, place):
        message = "This user is a member there already: set their role."
        raise HelixError(ErrorKind.CONFLICT, message, param="email")
    invitation, token = await invite(unit, organisation_id, email, request.role, place, token_life_s=token_life_s)
    unit.record("invitation", invitation.id, after=describe_invitation(invitation))
    return pb.InviteUserResponse(invitation=invitation, token=token)


async def list_invitations(unit: Unit, request: pb.ListRequest) -> pb.ListInvitationsResponse:
    rows, cursor = await read_page(
        unit.connection,
        select(one_time_tokens).where(open_invitations(unit.caller.organisation_id, unit.now)),
        (one_time_tokens.c.created_at, one_time_tokens.c.id),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    return pb.ListInvitationsResponse(invitations=map(_message, rows), next_cursor=cursor)


async def revoke_invitation(unit: Unit, request: pb.DeleteRequest) -> pb.DeleteResponse:
    """Only who could have made it may revoke it."""
    ours = and_(open_invitations(unit.caller.organisation_id, unit.now), one_time_tokens.c.id == request.id)
    row = (await unit.connection.execute(select(one_time_tokens).where(ours))).first()
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, f"There is no open invitation {request.id!r}.", param="id")
    check_version(_VERSION, request.if_version)
    await check_role(unit, row.role, row.project_id)
    await unit.connection.execute(delete(one_time_tokens).where(one_time_tokens.c.id == row.id))
    unit.record("invitation", row.id, before=describe_invitation(_message(row)))
    return pb.DeleteResponse()


async def _earlier(unit: Unit, organisation_id: str, email: str, project_id: str) -> Sequence[Row[Any]]:
    """The open invitations of an e-mail to one place."""
    query = select(one_time_tokens).where(
        open_invitations(organisation_id, unit.now),
        one_time_tokens.c.email_key == email_key(email),
        one_time_tokens.c.project_id == project_id,
    )
    return (await unit.connection.execute(query)).all()


async def is_member(unit: Unit, organisation_id: str, email: str, project_id: str = "") -> bool:
    """Whether an account with that e-mail has a role in the project, or with '' in the organisation."""
    member = (
        select(memberships.c.account_id)
        .join(accounts, accounts.c.id == memberships.c.account_id)
        .where(
            memberships.c.organisation_id == organisation_id,
            memberships.c.project_id == project_id,
            accounts.c.email_key == email_key(email),
        )
    )
    return (await unit.connection.execute(member)).first() is not None


def describe_invitation(invitation: pb.Invitation) -> dict[str, Any]:
    """What the audit log says of an invitation."""
    return {"email": invitation.email, "role": invitation.role, "project_id": invitation.project_id}


def _message(row: Row[Any]) -> pb.Invitation:
    return pb.Invitation(
        id=row.id,
        email=row.email,
        role=row.role,
        project_id=row.project_id,
        created_at=row.created_at,
        expires_at=row.expires_at,
        invited_by=row.created_by,
    )


def operations(token_life_s: int) -> Mapping[str, Operation]:
    """`token_life_s`: how long an invitation works."""
    return {
        "InviteUser": Operation(partial(invite_user, token_life_s=token_life_s)),
        "ListInvitations": Operation(list_invitations),
        "RevokeInvitation": Operation(revoke_invitation),
    }
