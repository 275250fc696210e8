"""What callers see of themselves and do with their own sessions and password."""

from typing import Final

from sqlalchemy import select, update

from helixflow.auth.caller import CallerKind
from helixflow.auth.dispatch import Invocation
from helixflow.auth.one_time_tokens import end_of_account
from helixflow.auth.passwords import Passwords
from helixflow.auth.places import organisations_of
from helixflow.auth.proof import PasswordProof, find_account, recheck
from helixflow.auth.sessions import EndReason, describe_session, end_session, end_sessions, find_session, is_open
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import Permission
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import accounts, sessions

# Nobody signs in that often within a day and means it.
_MOST_SESSIONS: Final = 100


async def get_self(unit: Unit, _request: pb.GetSelfRequest) -> pb.Self:
    """Of keys too; only accounts have an e-mail and organisations."""
    caller = unit.caller
    answer = pb.Self(
        kind=caller.kind.value,
        id=caller.id,
        name=caller.name,
        organisation_id=caller.organisation_id,
        project_id=caller.project_id,
        roles=caller.roles,
        permissions=_values(caller.grants.organisation),
        operator=caller.operator,
        projects=[
            pb.ProjectPermissions(project_id=project_id, permissions=_values(held))
            for project_id, held in sorted(caller.grants.projects.items())
        ],
    )
    account = await find_account(unit.connection, caller.id) if caller.kind is CallerKind.ACCOUNT else None
    if account is not None:
        answer.name = account.name
        answer.email = account.email
        answer.mfa_enabled = account.totp_confirmed_at is not None
        for organisation_id, name in (await organisations_of(unit.connection, account.id)).items():
            answer.organisations.add(organisation_id=organisation_id, name=name)
    return answer


async def list_own_sessions(unit: Unit, _request: pb.ListOwnSessionsRequest) -> pb.ListSessionsResponse:
    """Newest first, a hundred at most. None for keys."""
    rows = await unit.connection.execute(
        select(sessions)
        .where(sessions.c.account_id == unit.caller.id, is_open(unit.now))
        .order_by(sessions.c.created_at.desc(), sessions.c.id.desc())
        .limit(_MOST_SESSIONS)
    )
    return pb.ListSessionsResponse(sessions=[describe_session(row, unit.caller.session_id) for row in rows])


async def end_own_session(unit: Unit, request: pb.EndOwnSessionRequest) -> pb.EndOwnSessionResponse:
    """Raises `HelixError` NOT_FOUND for one that has ended, or is somebody else's."""
    session = await find_session(unit, request.session_id)
    if session is None or session.account_id != unit.caller.id:
        raise HelixError(ErrorKind.NOT_FOUND, "There is no such session.", param="session_id")
    await end_session(unit, session.id, EndReason.REVOKED)
    unit.record("session", session.id)
    return pb.EndOwnSessionResponse()


class OwnPassword:
    """ChangePassword."""

    def __init__(self, passwords: Passwords, proof: PasswordProof) -> None:
        self._passwords = passwords
        self._proof = proof

    async def change(self, invocation: Invocation, request: pb.ChangePasswordRequest) -> pb.ChangePasswordResponse:
        account = await self._proof.of_caller(invocation, request.current_password)
        new_hash = await self._passwords.hash_new(
            request.new_password, email=account.email, name=account.name, param="new_password"
        )
        async with invocation.writing() as unit:
            await recheck(unit, account)
            await set_password(unit, account.id, new_hash)
            ended = await end_sessions(unit, account.id, None, EndReason.PASSWORD, but=unit.caller.session_id)
            unit.record("user", account.id, after={"sessions_ended": ended})
        return pb.ChangePasswordResponse()


async def set_password(unit: Unit, account_id: str, password_hash: str) -> None:
    """Whatever was to be redeemed with the old one ends."""
    await unit.connection.execute(
        update(accounts)
        .where(accounts.c.id == account_id)
        .values(password_hash=password_hash, updated_at=unit.now, version=accounts.c.version + 1)
    )
    await end_of_account(unit, account_id)


def _values(permissions: frozenset[Permission]) -> list[str]:
    return sorted(permission.value for permission in permissions)
