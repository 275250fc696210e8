"""What a sign-in gives: tokens for a session, for what the account may do at this moment."""

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, update

from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.changes import current_revision
from helixflow.auth.places import Place, find_place
from helixflow.auth.sessions import Opened, open_session
from helixflow.auth.tokens import AccessTokens, Subject, UnsignedToken
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import INSTALLATION_PERMISSIONS
from helixflow.rpc.generated.auth_v1 import sessions_pb2
from helixflow.storage.schema import accounts

_SIGN_IN: Final = "login"


@dataclass(frozen=True, slots=True)
class Admission:
    """Tokens that wait for their transaction to be committed; the access token is still to be signed."""

    access_token: UnsignedToken
    refresh_token: str
    refresh_life_s: int


class SignIn:
    """Opens sessions, and makes the answers of Login, VerifyMfa and Refresh."""

    def __init__(self, tokens: AccessTokens) -> None:
        self._tokens = tokens

    async def open(self, unit: Unit, account: Row[Any], place: Place, method: str) -> Admission:
        """A new session of `account`, recorded at its home and where it signs in. The unit then acts in its name."""
        opened = await open_session(unit, account.id, place.organisation_id, place.project_id, method)
        await unit.connection.execute(
            update(accounts).where(accounts.c.id == account.id).values(last_login_at=unit.now)
        )
        _enter(unit, account, place, opened.id, {"method": method})
        return await self.admit(unit, account, place, opened)

    async def follow(self, unit: Unit, account: Row[Any], place: Place, session: Row[Any]) -> Admission:
        """A session that follows from `session`, which has ended, in another organisation: recorded as a sign-in."""
        opened = await open_session(
            unit, account.id, place.organisation_id, place.project_id, session.method, follows=session
        )
        _enter(unit, account, place, opened.id, {"method": session.method, "follows": session.id}, _SIGN_IN)
        return await self.admit(unit, account, place, opened)

    async def admit(self, unit: Unit, account: Row[Any], place: Place, session: Opened) -> Admission:
        """Tokens for a session that is open. An operator's also hold what gateways let only operators do."""
        beyond = INSTALLATION_PERMISSIONS if account.operator else frozenset()
        subject = Subject(
            account.id,
            account.name or account.email,
            session.id,
            session.until,
            place.organisation_id,
            place.project_id,
            place.held.roles,
            place.permissions | beyond,
            # The unit is alone in writing: nothing has changed since the place was looked up.
            await current_revision(unit.connection),
        )
        return Admission(await self._tokens.draft(unit, subject), session.refresh_token, session.until - unit.now)

    async def answer(self, admission: Admission) -> sessions_pb2.LoginResponse:
        """After the commit."""
        claims = admission.access_token.claims
        return sessions_pb2.LoginResponse(
            access_token=await self._tokens.sign(admission.access_token),
            expires_in=claims.exp - claims.iat,
            refresh_token=admission.refresh_token,
            refresh_expires_in=admission.refresh_life_s,
            session_id=claims.sid,
        )


def _enter(
    unit: Unit,
    account: Row[Any],
    place: Place,
    session_id: str,
    after: dict[str, Any],
    action: str | None = None,
) -> None:
    become(unit, account, place.organisation_id, session_id)
    after = {**after, "organisation_id": place.organisation_id, "project_id": place.project_id}
    for chain in sorted({account.home_organisation_id, place.organisation_id}):
        unit.record("session", session_id, after=after, organisation_id=chain, action=action)


async def place_of(unit: Unit, account: Row[Any], organisation_id: str, project_id: str) -> Place:
    """Where `account` may sign in. Raises `HelixError` PERMISSION_DENIED or NOT_FOUND."""
    if account.suspended_at is not None:
        raise HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: this account is suspended.")
    return await find_place(unit.connection, account, organisation_id, project_id)


def become(unit: Unit, account: Row[Any], organisation_id: str, session_id: str = "") -> None:
    """From here on the unit acts in the name of `account`."""
    name = account.name or account.email
    source = unit.caller.source
    unit.caller = Caller(CallerKind.ACCOUNT, account.id, name, organisation_id, session_id=session_id, source=source)
