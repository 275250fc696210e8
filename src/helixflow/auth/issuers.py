"""Who stands behind an invitation or a reset: it works only while they could still issue it.

Somebody may send tokens to addresses of their own. When they are suspended, deleted, removed or demoted, or the key
that they used is revoked, their open tokens end; whatever else may have changed is asked again when one is redeemed.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.authentication import find_key, held_by_key
from helixflow.auth.authority import administers_elsewhere, holds_no_more
from helixflow.auth.grants import grants_of_account, permissions_of_role
from helixflow.auth.one_time_tokens import Purpose
from helixflow.auth.places import organisations_of
from helixflow.auth.unit import Unit
from helixflow.core.permissions import INSTALLATION_PERMISSIONS, Grants, parse_permission
from helixflow.storage.schema import accounts, api_keys, one_time_tokens

_ISSUED = (Purpose.INVITE.value, Purpose.RESET.value)


@dataclass(frozen=True, slots=True)
class _Issuer:
    """What somebody may do now in the organisation of a token that they issued."""

    grants: Grants
    operator: bool


async def stands(unit: Unit, token: Row[Any]) -> bool:
    """Whether an invitation or reset (a row of `one_time_tokens`) still has somebody behind it who may issue it."""
    issuer = await _find_issuer(unit, token.created_by, token.created_with, token.organisation_id)
    return issuer is not None and await _may_issue(unit.connection, issuer, token)


async def end_fallen(unit: Unit, issuer_id: str, organisation_id: str | None = None) -> None:
    """After a change of what somebody may do, in one organisation or with None in all: ends what they issued and could
    not issue any more. `issuer_id` is that of an account or service account.
    """
    theirs = one_time_tokens.c.created_by == issuer_id
    if organisation_id is not None:
        theirs = and_(theirs, one_time_tokens.c.organisation_id == organisation_id)
    await _end_fallen(unit, theirs)


async def end_fallen_of_keys(unit: Unit, which: ColumnElement[bool]) -> None:
    """As `end_fallen`, of what was issued with keys, after a change of these. `which`: a condition on `api_keys`."""
    await _end_fallen(unit, one_time_tokens.c.created_with.in_(select(api_keys.c.id).where(which)))


async def _end_fallen(unit: Unit, which: ColumnElement[bool]) -> None:
    unused = and_(
        which,
        one_time_tokens.c.purpose.in_(_ISSUED),
        one_time_tokens.c.used_at.is_(None),
        one_time_tokens.c.expires_at > unit.now,
    )
    found = (await unit.connection.execute(select(one_time_tokens).where(unused).order_by(one_time_tokens.c.id))).all()
    issuers: dict[tuple[str, str, str], _Issuer | None] = {}
    for token in found:
        source = (token.created_by, token.created_with, token.organisation_id)
        if source not in issuers:
            issuers[source] = await _find_issuer(unit, *source)
        issuer = issuers[source]
        if issuer is None or not await _may_issue(unit.connection, issuer, token):
            await unit.connection.execute(delete(one_time_tokens).where(one_time_tokens.c.id == token.id))
            _record_end(unit, token)


def _record_end(unit: Unit, token: Row[Any]) -> None:
    if token.purpose == Purpose.INVITE.value:
        before = {"email": token.email, "role": token.role, "project_id": token.project_id}
        unit.record(
            "invitation", token.id, before=before, organisation_id=token.organisation_id, action="revoke_invitation"
        )
    else:
        unit.record("user", token.account_id, organisation_id=token.organisation_id, action="revoke_reset")


async def _find_issuer(unit: Unit, issuer_id: str, key_id: str, organisation_id: str) -> _Issuer | None:
    """None for who has gone, or may do nothing at this moment."""
    connection = unit.connection
    if key_id:
        key_hash = (await connection.execute(select(api_keys.c.hash).where(api_keys.c.id == key_id))).scalar()
        row = await find_key(connection, key_hash) if key_hash is not None else None
        held = await held_by_key(connection, row, unit.now) if row is not None else None
        if row is None or held is None:
            return None
        return _Issuer(held.grants if row.organisation_id == organisation_id else Grants(), row.bootstrap)
    query = select(accounts.c.operator).where(
        accounts.c.id == issuer_id, accounts.c.suspended_at.is_(None), accounts.c.deleted_at.is_(None)
    )
    account = (await connection.execute(query)).first()
    # Who is a member nowhere cannot sign in, operator or not.
    if account is None or not await organisations_of(connection, issuer_id):
        return None
    member = await grants_of_account(connection, issuer_id, organisation_id)
    return _Issuer(member.grants if member is not None else Grants(), account.operator)


async def _may_issue(connection: AsyncConnection, issuer: _Issuer, token: Row[Any]) -> bool:
    permission = parse_permission(token.needs)
    if permission is None:
        return False
    if permission in INSTALLATION_PERMISSIONS:
        return issuer.operator
    if not issuer.grants.allows(permission, token.project_id or None):
        return False
    if token.purpose == Purpose.INVITE.value:
        given = await permissions_of_role(connection, token.organisation_id, token.role)
        return (given or frozenset()) <= issuer.grants.within(token.project_id or None)
    return await _may_reset(connection, issuer, token)


async def _may_reset(connection: AsyncConnection, issuer: _Issuer, token: Row[Any]) -> bool:
    account = (await connection.execute(select(accounts).where(accounts.c.id == token.account_id))).one()
    if not await holds_no_more(connection, account.id, token.organisation_id, issuer.grants):
        return False
    if issuer.operator:
        return True
    own = token.created_by == account.id and not token.created_with
    return not account.operator and (
        own or not await administers_elsewhere(connection, account.id, token.organisation_id)
    )
