"""Sessions: what a sign-in opens, refresh tokens keep up, and many things end.

A session has refresh tokens, each used once for the next, and ends by itself when the latest has expired. It belongs to
one organisation. Who goes on in another one gets another session there: all that follow from one sign-in are a family,
of which at most one is open.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from sqlalchemy import BindParameter, ColumnElement, FromClause, Row, and_, insert, select, true, update

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
    MOVED = "moved"
    REUSED = "reused"
    REVOKED = "revoked"
    PASSWORD = "password"  # noqa: S105 — the word, not one
    SUSPENDED = "suspended"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Opened:
    """An open session and its latest refresh token, which is not kept; both end at `until`, seconds since the epoch."""

    id: str
    refresh_token: str = field(repr=False)
    until: int


def is_open(now: int | BindParameter[int], rows: FromClause = sessions) -> ColumnElement[bool]:
    """The condition on rows of `sessions`, or of an alias of it."""
    return and_(rows.c.ended_at.is_(None), rows.c.expires_at > now)


async def open_session(
    unit: Unit,
    account_id: str,
    organisation_id: str,
    project_id: str,
    method: str,
    *,
    follows: Row[Any] | None = None,
) -> Opened:
    """A new session: of the family of the session that it `follows`, and no longer than that could last, if any."""
    session_id = f"ses_{secrets.token_hex(12)}"
    last_until = follows.last_until if follows is not None else unit.now + SESSION_LIFE_S
    until = min(unit.now + REFRESH_LIFE_S, last_until)
    await unit.connection.execute(
        insert(sessions).values(
            id=session_id,
            account_id=account_id,
            organisation_id=organisation_id,
            family_id=follows.family_id if follows is not None else session_id,
            project_id=project_id,
            method=method,
            address=_shown(unit.caller.source.address),
            user_agent=_shown(unit.caller.source.software),
            created_at=unit.now,
            refreshed_at=unit.now,
            expires_at=until,
            last_until=last_until,
            ended_at=None,
            end_reason=None,
        )
    )
    return await _add_refresh_token(unit, session_id, until)


async def prolong_session(unit: Unit, session: Row[Any], project_id: str) -> Opened:
    """An open session for another day, as far as it may last. Mark its latest refresh token as used."""
    until = min(unit.now + REFRESH_LIFE_S, session.last_until)
    await unit.connection.execute(
        update(sessions)
        .where(sessions.c.id == session.id)
        .values(project_id=project_id, refreshed_at=unit.now, expires_at=until)
    )
    return await _add_refresh_token(unit, session.id, until)


async def _add_refresh_token(unit: Unit, session_id: str, until: int) -> Opened:
    token = generate_key(REFRESH_PREFIX)
    await unit.connection.execute(
        insert(refresh_tokens).values(
            hash=hash_key(token), session_id=session_id, issued_at=unit.now, expires_at=until, used_at=None
        )
    )
    return Opened(session_id, token, until)


async def end_session(unit: Unit, session_id: str, reason: EndReason) -> None:
    """Ends one session, unless it has ended already, and tells the gateways."""
    await _end(unit, sessions.c.id == session_id, reason)


async def end_family(unit: Unit, family_id: str, reason: EndReason) -> Sequence[Row[Any]]:
    """Ends what is open of a family and tells the gateways. Returns `id` and `organisation_id` of what ended."""
    return await _end(unit, sessions.c.family_id == family_id, reason)


async def end_sessions(
    unit: Unit, account_id: str, organisation_id: str | None, reason: EndReason, *, but: str = ""
) -> int:
    """Ends an account's sessions in one organisation, or with None in all, except the one with the id `but`.

    With those in an organisation end those elsewhere of a family that has been there: their refresh tokens would bring
    them back. Tells the gateways. Returns how many sessions ended, in that organisation.
    """
    which = and_(sessions.c.account_id == account_id, sessions.c.id != but)
    if organisation_id is not None:
        kin = sessions.alias("kin")
        been_there = select(kin.c.family_id).where(
            kin.c.account_id == account_id, kin.c.organisation_id == organisation_id
        )
        which = and_(which, sessions.c.family_id.in_(been_there))
    ended = await _end(unit, which, reason)
    return sum(organisation_id in (None, row.organisation_id) for row in ended)


async def end_all_sessions(unit: Unit, reason: EndReason) -> int:
    """Ends every session of the installation and tells the gateways. Returns how many there were."""
    return len(await _end(unit, true(), reason))


async def _end(unit: Unit, which: ColumnElement[bool], reason: EndReason) -> Sequence[Row[Any]]:
    ended = await unit.connection.execute(
        update(sessions)
        .where(which, is_open(unit.now))
        .values(ended_at=unit.now, end_reason=reason.value)
        .returning(sessions.c.id, sessions.c.organisation_id)
    )
    rows = sorted(ended.all())
    for row in rows:
        await unit.change(identity_pb2.CHANGE_KIND_SESSION, row.id)
    return rows


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
