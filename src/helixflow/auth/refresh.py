"""Refresh and Logout: what is done with a refresh token, which works once.

One that comes a second time has been stolen, or its answer was lost: nobody can tell which. Its session ends.
"""

from contextlib import suppress
from typing import Any, Final

from sqlalchemy import Row, select, update

from helixflow.auth.dispatch import Invocation
from helixflow.auth.places import Place, find_place
from helixflow.auth.proof import find_account
from helixflow.auth.sessions import (
    REFRESH_LIFE_S,
    SESSION_LIFE_S,
    EndReason,
    add_refresh_token,
    end_session,
    find_session,
)
from helixflow.auth.sign_in import Admission, SignIn, become
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import REFRESH_PREFIX, hash_key, is_well_formed
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import accounts, refresh_tokens, sessions

_REUSED: Final = "refresh_token_reused"


class Refresh:
    """All within one writing unit: of two refreshes at once the second finds the token used."""

    def __init__(self, sign_in: SignIn) -> None:
        self._sign_in = sign_in

    async def refresh(self, invocation: Invocation, request: pb.RefreshRequest) -> pb.LoginResponse:
        async with invocation.writing() as unit:
            token = await _find_token(unit, request.refresh_token)
            admission = None
            if token is not None and token.used_at is not None:
                # Committed before it is refused.
                await _end_family(unit, token)
            elif token is not None:
                admission = await self._renew(unit, token, request)
        if admission is None:
            raise HelixError(ErrorKind.INVALID_TOKEN, "The refresh token has expired or was used. Sign in again.")
        return await self._sign_in.answer(admission)

    async def logout(self, invocation: Invocation, request: pb.LogoutRequest) -> pb.LogoutResponse:
        async with invocation.writing() as unit:
            token = await _find_token(unit, request.refresh_token)
            session = await find_session(unit, token.session_id) if token is not None else None
            account = await find_account(unit.connection, session.account_id) if session is not None else None
            if session is not None and account is not None:
                become(unit, account, session.organisation_id, session.id)
                await end_session(unit, session.id, EndReason.LOGOUT)
                unit.record("session", session.id)
        return pb.LogoutResponse()

    async def _renew(self, unit: Unit, token: Row[Any], request: pb.RefreshRequest) -> Admission | None:
        session = await find_session(unit, token.session_id)
        if session is None or token.expires_at <= unit.now:
            return None
        account = await find_account(unit.connection, session.account_id)
        if account is None or account.suspended_at is not None:
            return None
        place = await _place(unit, account, session, request)
        expires_at = min(unit.now + REFRESH_LIFE_S, session.created_at + SESSION_LIFE_S)
        if place is None or expires_at <= unit.now:
            return None
        await unit.connection.execute(
            update(refresh_tokens).where(refresh_tokens.c.hash == token.hash).values(used_at=unit.now)
        )
        await unit.connection.execute(
            update(sessions)
            .where(sessions.c.id == session.id)
            .values(
                organisation_id=place.organisation_id,
                project_id=place.project_id,
                refreshed_at=unit.now,
                expires_at=expires_at,
            )
        )
        if place.organisation_id != session.organisation_id:
            # Who ends the sessions of that organisation will not find this one any more.
            await unit.change(identity_pb2.CHANGE_KIND_OWNER, account.id, organisation_id=session.organisation_id)
        fresh = await add_refresh_token(unit, session.id, expires_at)
        become(unit, account, place.organisation_id, session.id)
        return await self._sign_in.admit(unit, account, place, session.id, fresh, expires_at - unit.now)


async def _place(unit: Unit, account: Row[Any], session: Row[Any], request: pb.RefreshRequest) -> Place | None:
    """Where the session goes on: None when that is nowhere. A project that is gone gives way to the default one.

    Raises `HelixError` NOT_FOUND for what the client asks for; the token is then not used up.
    """
    organisation_id = request.organisation_id or session.organisation_id
    if organisation_id == session.organisation_id and session.project_id and not request.project_id:
        with suppress(HelixError):
            return await find_place(unit.connection, account, organisation_id, session.project_id)
    try:
        return await find_place(unit.connection, account, organisation_id, request.project_id)
    except HelixError:
        if request.organisation_id or request.project_id:
            raise
        return None


async def _find_token(unit: Unit, token: str) -> Row[Any] | None:
    if not is_well_formed(token, REFRESH_PREFIX):
        return None
    query = select(refresh_tokens).where(refresh_tokens.c.hash == hash_key(token))
    return (await unit.connection.execute(query)).first()


async def _end_family(unit: Unit, token: Row[Any]) -> None:
    """Ends the session of a token that came again, once."""
    owner = select(accounts.c.home_organisation_id, accounts.c.id).join(
        sessions, sessions.c.account_id == accounts.c.id
    )
    row = (await unit.connection.execute(owner.where(sessions.c.id == token.session_id))).one()
    if await end_session(unit, token.session_id, EndReason.REUSED):
        after = {"account_id": row.id, "issued_at": token.issued_at, "used_at": token.used_at}
        unit.record("session", token.session_id, after=after, organisation_id=row.home_organisation_id, action=_REUSED)
