"""Whom an API key acts for, and whether a caller may give out what such a key would hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from sqlalchemy import select

from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.grants import NOTHING, grants_of_account, grants_of_role
from helixflow.auth.restrictions import check_effective_in_project
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import OPERATOR_SCOPES, Grants, Permission
from helixflow.storage.schema import accounts, service_accounts


class OwnerKind(Enum):
    """Nobody: the key is the project's own."""

    PROJECT = "project"
    ACCOUNT = "account"
    SERVICE_ACCOUNT = "service_account"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom a key of `project_id` acts for. `grants`: what they may do, also while they are suspended.

    `project_only`: they will never hold anything outside that project.
    """

    kind: OwnerKind
    id: str
    project_id: str
    grants: Grants
    project_only: bool

    def check_scopes(self, scopes: frozenset[Permission]) -> None:
        """Raises `HelixError` UNPROCESSABLE for scopes that a key of theirs could not use."""
        scopes -= OPERATOR_SCOPES
        if self.project_only:
            check_effective_in_project(scopes)
        if self.kind is not OwnerKind.PROJECT and (missing := scopes - self.grants.within(self.project_id)):
            message = f"Its owner may not do this in the project: {_listed(missing)}."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param="scopes")

    def held(self, scopes: frozenset[Permission]) -> Grants:
        """All that a key with these scopes allows, as `authentication.held_by_key` will find."""
        if self.kind is OwnerKind.PROJECT:
            return Grants(projects={self.project_id: scopes})
        return self.grants.restricted_to(scopes)

    def check_caller(self, caller: Caller, scopes: frozenset[Permission]) -> None:
        """Raises `HelixError` PERMISSION_DENIED unless the caller may do all that such a key allows, wherever it does.

        The scopes count in the key's project also where the owner does not hold them now: that may change. Those that
        operators give are no matter of the owner; that a key has them does not mean that it may hand them on.
        """
        missing = frozenset() if caller.operator else scopes & OPERATOR_SCOPES
        scopes -= OPERATOR_SCOPES
        held = self.held(scopes)
        missing |= (held.organisation - caller.grants.organisation) | (scopes - caller.grants.within(self.project_id))
        for project_id, permissions in held.projects.items():
            missing |= permissions - caller.grants.within(project_id)
        if missing:
            message = f"Not permitted: such a key may do what you may not: {_listed(missing)}."
            raise HelixError(ErrorKind.PERMISSION_DENIED, message, param="scopes")


async def read_owner(unit: Unit, owner_id: str, project_id: str) -> Owner:
    """The owner of an existing key of the caller's organisation."""
    if not owner_id:
        return Owner(OwnerKind.PROJECT, "", project_id, NOTHING.grants, project_only=True)
    if (owner := await _service_account(unit, owner_id, project_id)) is not None:
        return owner
    member = await grants_of_account(unit.connection, owner_id, unit.caller.organisation_id)
    return Owner(OwnerKind.ACCOUNT, owner_id, project_id, (member or NOTHING).grants, project_only=False)


async def choose_owner(unit: Unit, owner_id: str, project_id: str) -> Owner:
    """The owner of a key to be made: nobody (''), the caller's own account, or a service account that belongs there.

    Raises `HelixError` UNPROCESSABLE for anybody else.
    """
    if not owner_id:
        return await read_owner(unit, "", project_id)
    owner = await _service_account(unit, owner_id, project_id)
    if owner is None and owner_id == unit.caller.subject_id and await _is_account(unit):
        owner = await read_owner(unit, owner_id, project_id)
    if owner is None:
        message = "A key acts for yourself, for a service account of its project or organisation, or for nobody ('')."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="owner_id")
    return owner


async def _is_account(unit: Unit) -> bool:
    caller = unit.caller
    if caller.kind is CallerKind.ACCOUNT:
        return True
    query = select(accounts.c.id).where(accounts.c.id == caller.subject_id)
    return (await unit.connection.execute(query)).first() is not None


async def _service_account(unit: Unit, owner_id: str, project_id: str) -> Owner | None:
    """The service account of that id, if its role holds in the organisation or in that project."""
    query = select(service_accounts.c.project_id, service_accounts.c.role).where(
        service_accounts.c.id == owner_id,
        service_accounts.c.organisation_id == unit.caller.organisation_id,
        service_accounts.c.project_id.in_(("", project_id)),
        service_accounts.c.deleted_at.is_(None),
    )
    row = (await unit.connection.execute(query)).first()
    if row is None:
        return None
    held = await grants_of_role(unit.connection, unit.caller.organisation_id, row.project_id, row.role)
    return Owner(OwnerKind.SERVICE_ACCOUNT, owner_id, project_id, held.grants, project_only=bool(row.project_id))


def _listed(permissions: Iterable[Permission]) -> str:
    return ", ".join(sorted(permissions))
