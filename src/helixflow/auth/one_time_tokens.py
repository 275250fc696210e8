"""Tokens that are redeemed once: invitations, resets of passwords, challenges for a second factor."""

import secrets
from enum import Enum
from typing import Any, Final

from sqlalchemy import Row, bindparam, insert, select, update

from helixflow.auth.caller import CallerKind
from helixflow.auth.grants import Reader
from helixflow.auth.texts import email_key
from helixflow.auth.unit import Unit
from helixflow.core.keys import CHALLENGE_PREFIX, TOKEN_PREFIX, generate_key, hash_key, is_well_formed
from helixflow.storage.schema import one_time_tokens


class Purpose(Enum):
    """The value is what the table says."""

    INVITE = "invite"
    RESET = "reset"
    MFA = "mfa"


# Built once: making a statement takes longer than to run it.
_FIND: Final = select(one_time_tokens).where(
    one_time_tokens.c.hash == bindparam("token_hash"),
    one_time_tokens.c.used_at.is_(None),
    one_time_tokens.c.expires_at > bindparam("now"),
)
_PREFIXES: Final = {Purpose.INVITE: TOKEN_PREFIX, Purpose.RESET: TOKEN_PREFIX, Purpose.MFA: CHALLENGE_PREFIX}
_ID_PREFIXES: Final = {Purpose.INVITE: "inv_", Purpose.RESET: "rst_", Purpose.MFA: "mfa_"}


async def issue(
    unit: Unit,
    purpose: Purpose,
    *,
    organisation_id: str,
    life_s: int,
    account_id: str | None = None,
    project_id: str = "",
    email: str = "",
    role: str = "",
    method: str = "",
) -> tuple[str, str]:
    """The id of a new token, and the token itself, which is not kept. It works for `life_s` seconds.

    An invitation is for `email` and gives `role` in the organisation or in the project. A reset is for `account_id`;
    the account's earlier resets end with it. Both work as long as the caller may issue such a token (`issuers`).
    """
    token_id, token = _ID_PREFIXES[purpose] + secrets.token_hex(12), generate_key(_PREFIXES[purpose])
    if purpose is Purpose.RESET:
        await end_of_account(unit, account_id or "", Purpose.RESET)
    await unit.connection.execute(
        insert(one_time_tokens).values(
            id=token_id,
            hash=hash_key(token),
            purpose=purpose.value,
            account_id=account_id,
            organisation_id=organisation_id,
            project_id=project_id,
            email=email,
            email_key=email_key(email),
            role=role,
            method=method,
            attempts=0,
            created_by=unit.caller.subject_id,
            created_with=unit.caller.id if unit.caller.kind is CallerKind.KEY else "",
            needs=unit.permission.value if unit.permission is not None else "",
            created_at=unit.now,
            expires_at=unit.now + life_s,
            used_at=None,
        )
    )
    return token_id, token


async def find(reader: Reader, token: str, purposes: tuple[Purpose, ...], now: int) -> Row[Any] | None:
    """The row of a token that still works for one of `purposes`; None for all others."""
    prefixes = {_PREFIXES[purpose] for purpose in purposes}
    if not any(is_well_formed(token, prefix) for prefix in prefixes):
        return None
    row = (await reader.execute(_FIND, {"token_hash": hash_key(token), "now": now})).first()
    return row if row is not None and Purpose(row.purpose) in purposes else None


async def use(unit: Unit, token_id: str) -> None:
    """The token works no more. Look it up in the same writing unit: only one can then use it."""
    await unit.connection.execute(
        update(one_time_tokens).where(one_time_tokens.c.id == token_id).values(used_at=unit.now)
    )


async def end_of_account(unit: Unit, account_id: str, *purposes: Purpose) -> None:
    """Ends an account's unused tokens of those purposes, all of them when none is given."""
    statement = update(one_time_tokens).where(
        one_time_tokens.c.account_id == account_id, one_time_tokens.c.used_at.is_(None)
    )
    if purposes:
        statement = statement.where(one_time_tokens.c.purpose.in_([purpose.value for purpose in purposes]))
    await unit.connection.execute(statement.values(used_at=unit.now))


async def end_all(unit: Unit, purpose: Purpose) -> None:
    """Ends the unused tokens of that purpose, of everybody."""
    unused = update(one_time_tokens).where(
        one_time_tokens.c.purpose == purpose.value, one_time_tokens.c.used_at.is_(None)
    )
    await unit.connection.execute(unused.values(used_at=unit.now))
