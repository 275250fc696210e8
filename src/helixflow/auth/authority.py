"""Nobody gives what they do not have, nobody touches who holds more, and an organisation keeps an owner.

An owner counts while they can sign in: neither suspended nor deleted, and with a password. Whoever takes the role from
such an owner, suspends or deletes them must leave another one, in every organisation that they own. An owner who cannot
sign in may go. Resetting the last one is permitted: it is how they come back.
"""

from typing import Any

from sqlalchemy import Row, Select, select

from helixflow.auth.grants import NOTHING, grants_of_account, permissions_of_role
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import OWNER, Permission
from helixflow.storage.schema import accounts, memberships, organisations


async def check_role(unit: Unit, role: str, project_id: str, param: str = "role") -> None:
    """Whether the caller may give `role` in that project, or with '' in the organisation.

    Raises `HelixError` UNPROCESSABLE when there is no such role, PERMISSION_DENIED when it allows more than they may.
    """
    permissions = await permissions_of_role(unit.connection, unit.caller.organisation_id, role)
    if permissions is None:
        raise HelixError(ErrorKind.UNPROCESSABLE, f"There is no role {role!r}.", param=param)
    check_held(unit, permissions, project_id)


def check_held(unit: Unit, permissions: frozenset[Permission], project_id: str) -> None:
    """Whether the caller has all `permissions` in that project, or with '' in the organisation.

    Raises `HelixError` PERMISSION_DENIED, which names one that is missing.
    """
    if missing := permissions - unit.caller.grants.within(project_id or None):
        first = min(permission.value for permission in missing)
        raise HelixError(
            ErrorKind.PERMISSION_DENIED, f"Not permitted: this needs all that is given, and you do not have {first}."
        )


async def check_outranks(unit: Unit, account: Row[Any], project_id: str | None = None) -> None:
    """Whether `account` holds nothing in the caller's organisation that the caller does not have: with '' in the
    organisation itself, with an id in that project, with None anywhere in it or, as an operator, beyond it.

    What the account may do in other organisations is not compared: it belongs to its home. Raises PERMISSION_DENIED.
    """
    caller = unit.caller
    held = (await grants_of_account(unit.connection, account.id, caller.organisation_id) or NOTHING).grants
    if project_id is None:
        places = ["", *held.projects]
        outranked = caller.operator or not account.operator
    else:
        places = [project_id]
        outranked = True
    if not outranked or any(held.within(place or None) - caller.grants.within(place or None) for place in places):
        raise HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: this user may do more than you.")


async def check_owner_remains(unit: Unit, account_id: str, organisation_id: str | None = None) -> None:
    """Whether the organisation, or with None every one, has an owner without this account, if that is one.

    Raises `HelixError` CONFLICT. The unit must be a writing one: of two that go at once, the second sees the first.
    """
    able, others = _able_owners().subquery(), _able_owners().subquery()
    owned = select(able.c.organisation_id).where(able.c.account_id == account_id)
    if organisation_id is not None:
        owned = owned.where(able.c.organisation_id == organisation_id)
    kept = select(others.c.organisation_id).where(others.c.account_id != account_id)
    if (await unit.connection.execute(owned.where(able.c.organisation_id.not_in(kept)).limit(1))).first() is not None:
        raise HelixError(
            ErrorKind.CONFLICT, "This user is the last owner of an organisation: make somebody else an owner first."
        )


def _able_owners() -> "Select[str, str]":
    return (
        select(memberships.c.organisation_id, memberships.c.account_id)
        .join(accounts, accounts.c.id == memberships.c.account_id)
        .join(organisations, organisations.c.id == memberships.c.organisation_id)
        .where(
            memberships.c.project_id == "",
            memberships.c.role == OWNER,
            accounts.c.suspended_at.is_(None),
            accounts.c.deleted_at.is_(None),
            accounts.c.password_hash.is_not(None),
            organisations.c.deleted_at.is_(None),
        )
    )
