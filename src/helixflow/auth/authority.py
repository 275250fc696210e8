"""Nobody gives what they do not have, nobody touches who holds more, and an organisation keeps an owner.

An owner counts while they can sign in: neither suspended nor deleted, and with a password. Whoever takes the role from
such an owner, suspends or deletes them must leave another one, in every organisation that they own. An owner who cannot
sign in may go. Resetting the last one is permitted: it is how they come back.
"""

from typing import Any, Final

from sqlalchemy import Row, Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.caller import CallerKind
from helixflow.auth.grants import NOTHING, grants_of_account, permissions_of_role
from helixflow.auth.places import organisations_of
from helixflow.auth.restrictions import Restrictions
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import OWNER, Grants, Permission
from helixflow.storage.schema import accounts, api_keys, memberships, organisations

_ADMINISTRATION: Final = (Permission.USERS_UPDATE, Permission.MEMBERS_UPDATE)


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
    outranked = project_id is not None or caller.operator or not account.operator
    if not outranked or not await holds_no_more(
        unit.connection, account.id, caller.organisation_id, caller.grants, project_id
    ):
        raise HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: this user may do more than you.")


async def holds_no_more(
    connection: AsyncConnection, account_id: str, organisation_id: str, grants: Grants, project_id: str | None = None
) -> bool:
    """Whether an account holds nothing in the organisation that is not in `grants`: places as for `check_outranks`."""
    held = (await grants_of_account(connection, account_id, organisation_id) or NOTHING).grants
    places = ["", *held.projects] if project_id is None else [project_id]
    return not any(held.within(place or None) - grants.within(place or None) for place in places)


async def administers_elsewhere(connection: AsyncConnection, account_id: str, organisation_id: str) -> bool:
    """Whether an account may change users or members anywhere in another organisation than that one."""
    for other in await organisations_of(connection, account_id):
        held = await grants_of_account(connection, account_id, other) if other != organisation_id else None
        if held is not None and any(held.grants.allows_somewhere(permission) for permission in _ADMINISTRATION):
            return True
    return False


async def check_may_take_over(unit: Unit, account: Row[Any]) -> None:
    """Whether the caller may do what lets them, or whoever they choose, sign in as `account`: an account that
    administers other organisations too is not the caller's alone to give away.

    Operators may, and everybody their own. Raises `HelixError` CONFLICT.
    """
    caller = unit.caller
    if caller.operator or (caller.kind is CallerKind.ACCOUNT and caller.id == account.id):
        return
    if await administers_elsewhere(unit.connection, account.id, caller.organisation_id):
        raise HelixError(
            ErrorKind.CONFLICT,
            "This user administers another organisation as well: only an operator of the installation can do this. "
            "Their role here can be taken, and their sessions here ended.",
        )


async def limits_of_caller(unit: Unit) -> Restrictions:
    """What the key is restricted to that makes this call: others must not undo it. None for other callers."""
    if unit.caller.kind is not CallerKind.KEY:
        return Restrictions()
    row = (await unit.connection.execute(select(api_keys).where(api_keys.c.id == unit.caller.id))).first()
    return Restrictions.of(row) if row is not None else Restrictions()


async def check_unrestricted(unit: Unit) -> None:
    """Whether the caller may let somebody in, or raise them: who comes by a key that is restricted to models, networks
    or a time would not be. Raises `HelixError` PERMISSION_DENIED.
    """
    if await limits_of_caller(unit) != Restrictions():
        message = "Not permitted: the key that makes this call is restricted to models, networks or a time; people and "
        raise HelixError(ErrorKind.PERMISSION_DENIED, message + "service accounts would not be.")


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
