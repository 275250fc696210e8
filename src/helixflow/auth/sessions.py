"""Sessions: what a sign-in opens, refresh tokens keep up, and many things end.

A session is one family of refresh tokens, each used once for the next. It ends by itself when the latest has expired.
"""

import secrets
from enum import Enum
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, and_, insert, select, true, update

from helixflow.auth.unit import Unit
from helixflow.core.keys import REFRESH_PREFIX, generate_key, hash_key
from helixflow.rpc.generated.auth_v1 import identity_pb2, sessions_pb2
from helixflow.storage.schema import refresh_tokens, sessions

REFRESH_LIFE_S: Final = 24 * 3600
# Also for who is never away for longer than that.
SESSION_LIFE_S: Final = 30 * 24 * 3600
_MAX_TEXT: Final = 256


class EndReason(Enum):
    """The value is what the table says."""

    LOGOUT = "logout"
    REUSED = "reused"
    REVOKED = "revoked"
    PASSWORD = "password"  # noqa: S105 — the word, not one
    SUSPENDED = "suspended"
    DELETED = "deleted"


def is_open(now: float) -> ColumnElement[bool]:
    """The condition on rows of `sessions`."""
    return and_(sessions.c.ended_at.is_(None), sessions.c.expires_at > now)


async def open_session(
    unit: Unit, account_id: str, organisation_id: str, project_id: str, method: str
) -> tuple[str, str, int]:
    """The id of a new session, its first refresh token, which is not kept, and in how many seconds that expires."""
    session_id = f"ses_{secrets.token_hex(12)}"
    await unit.connection.execute(
        insert(sessions).values(
            id=session_id,
            account_id=account_id,
            organisation_id=organisation_id,
            project_id=project_id,
            method=method,
            address=_shown(unit.caller.source.address),
            user_agent=_shown(unit.caller.source.software),
            created_at=unit.now,
            refreshed_at=unit.now,
            expires_at=unit.now + REFRESH_LIFE_S,
            ended_at=None,
            end_reason=None,
        )
    )
    token = await add_refresh_token(unit, session_id, unit.now + REFRESH_LIFE_S)
    return session_id, token, REFRESH_LIFE_S


async def add_refresh_token(unit: Unit, session_id: str, expires_at: int) -> str:
    """A new one, which is not kept. The one before it must have been marked as used."""
    token = generate_key(REFRESH_PREFIX)
    await unit.connection.execute(
        insert(refresh_tokens).values(
            hash=hash_key(token), session_id=session_id, issued_at=unit.now, expires_at=expires_at, used_at=None
        )
    )
    return token


async def end_session(unit: Unit, session_id: str, reason: EndReason) -> bool:
    """Ends one session and tells the gateways; False when it had ended already."""
    return await _end(unit, sessions.c.id == session_id, reason) == 1


async def end_sessions(
    unit: Unit, account_id: str, organisation_id: str | None, reason: EndReason, *, but: str = ""
) -> int:
    """Ends an account's sessions in one organisation, or with None in all, except the one with the id `but`.

    Tells the gateways. Returns how many sessions ended.
    """
    which = and_(sessions.c.account_id == account_id, sessions.c.id != but)
    if organisation_id is not None:
        which = and_(which, sessions.c.organisation_id == organisation_id)
    return await _end(unit, which, reason)


async def end_all_sessions(unit: Unit, reason: EndReason) -> int:
    """Ends every session of the installation and tells the gateways. Returns how many there were."""
    return await _end(unit, true(), reason)


async def _end(unit: Unit, which: ColumnElement[bool], reason: EndReason) -> int:
    ended = await unit.connection.execute(
        update(sessions)
        .where(which, is_open(unit.now))
        .values(ended_at=unit.now, end_reason=reason.value)
        .returning(sessions.c.id)
    )
    session_ids = sorted(ended.scalars())
    for session_id in session_ids:
        await unit.change(identity_pb2.CHANGE_KIND_SESSION, session_id)
    return len(session_ids)


async def find_session(unit: Unit, session_id: str) -> Row[Any] | None:
    """The row of an open session."""
    query = select(sessions).where(sessions.c.id == session_id, is_open(unit.now))
    return (await unit.connection.execute(query)).first()


def _shown(text: str) -> str:
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text[:_MAX_TEXT])


def describe_session(row: Row[Any], current_session_id: str = "") -> sessions_pb2.Session:
    """What may be shown of a row of `sessions`."""
    return sessions_pb2.Session(
        id=row.id,
        account_id=row.account_id,
        organisation_id=row.organisation_id,
        project_id=row.project_id,
        method=row.method,
        address=row.address,
        user_agent=row.user_agent,
        created_at=row.created_at,
        refreshed_at=row.refreshed_at,
        expires_at=row.expires_at,
        current=row.id == current_session_id,
    )
