"""Refresh and Logout: what is done with a refresh token, which works once.

One that comes a second time has been stolen, or its answer was lost: nobody can tell which. Its session ends, and what
followed from that elsewhere. What cannot work is refused before anything is written: anybody may try.
"""

from contextlib import suppress
from typing import Any, Final

from sqlalchemy import BigInteger, Row, bindparam, select, update

from helixflow.auth.dispatch import Invocation
from helixflow.auth.grants import Reader
from helixflow.auth.places import Place, find_place
from helixflow.auth.proof import find_account
from helixflow.auth.sessions import EndReason, end_family, end_session, find_session, is_open, prolong_session
from helixflow.auth.sign_in import Admission, SignIn, become
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import REFRESH_PREFIX, hash_key, is_well_formed
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.schema import accounts, refresh_tokens, sessions

_REUSED: Final = "refresh_token_reused"
_kin: Final = sessions.alias("kin")
# Built once: making a statement takes longer than to run it.
_FIND_TOKEN: Final = (
    select(refresh_tokens, sessions.c.family_id, sessions.c.account_id, sessions.c.organisation_id)
    .join(sessions, sessions.c.id == refresh_tokens.c.session_id)
    .where(
        refresh_tokens.c.hash == bindparam("token_hash"),
        select(_kin.c.id)
        .where(_kin.c.family_id == sessions.c.family_id, is_open(bindparam("now", type_=BigInteger()), _kin))
        .exists(),
    )
)


class Refresh:
    """All within one writing unit: of two refreshes at once the second finds the token used."""

    def __init__(self, sign_in: SignIn) -> None:
        self._sign_in = sign_in

    async def refresh(self, invocation: Invocation, request: pb.RefreshRequest) -> pb.LoginResponse:
        if not await _might_work(invocation, request.refresh_token):
            raise _refusal()
        async with invocation.writing() as unit:
            token = await _find_token(unit.connection, request.refresh_token, unit.now)
            admission = None
            if token is not None and token.used_at is not None:
                # Committed before it is refused.
                await _end_family(unit, token)
            elif token is not None:
                admission = await self._renew(unit, token, request)
        if admission is None:
            raise _refusal()
        return await self._sign_in.answer(admission)

    async def logout(self, invocation: Invocation, request: pb.LogoutRequest) -> pb.LogoutResponse:
        if not await _might_work(invocation, request.refresh_token):
            return pb.LogoutResponse()
        async with invocation.writing() as unit:
            token = await _find_token(unit.connection, request.refresh_token, unit.now)
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
        if place is None:
            return None
        await unit.connection.execute(
            update(refresh_tokens).where(refresh_tokens.c.hash == token.hash).values(used_at=unit.now)
        )
        become(unit, account, session.organisation_id, session.id)
        if place.organisation_id == session.organisation_id:
            return await self._sign_in.admit(
                unit, account, place, await prolong_session(unit, session, place.project_id)
            )
        await end_session(unit, session.id, EndReason.MOVED)
        unit.record("session", session.id, after={"end_reason": EndReason.MOVED.value})
        return await self._sign_in.follow(unit, account, place, session)


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


async def _might_work(invocation: Invocation, token: str) -> bool:
    """Without taking anybody's turn to write."""
    if not is_well_formed(token, REFRESH_PREFIX):
        return False
    return await _find_token(invocation.lookups, token, invocation.now) is not None


async def _find_token(reader: Reader, token: str, now: int) -> Row[Any] | None:
    """The row of a token, used or not, as long as anything is open that it could renew or end.

    With `family_id`, `account_id` and `organisation_id` of its session.
    """
    return (await reader.execute(_FIND_TOKEN, {"token_hash": hash_key(token), "now": now})).first()


async def _end_family(unit: Unit, token: Row[Any]) -> None:
    """Recorded at the account's home, where the token was from, and where the session was that ends."""
    query = select(accounts.c.home_organisation_id).where(accounts.c.id == token.account_id)
    chains = {(await unit.connection.execute(query)).scalar_one(), token.organisation_id}
    chains.update(ended.organisation_id for ended in await end_family(unit, token.family_id, EndReason.REUSED))
    after = {"account_id": token.account_id, "issued_at": token.issued_at, "used_at": token.used_at}
    for chain in sorted(chains):
        unit.record("session", token.session_id, after=after, organisation_id=chain, action=_REUSED)


def _refusal() -> HelixError:
    return HelixError(ErrorKind.INVALID_TOKEN, "The refresh token has expired or was used. Sign in again.")
