"""What a limit or budget can be on: the installation, an organisation, or something in it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sqlalchemy import Select, and_, exists, or_, select

from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import Permission
from helixflow.metering.policies import Scope
from helixflow.storage.schema import accounts, api_keys, memberships, organisations, projects, service_accounts

SCOPES: Final = tuple(Scope)


@dataclass(frozen=True, slots=True)
class Subject:
    """`organisation_id` and `id` are '' for the installation; the id of an organisation is its own."""

    organisation_id: str
    scope: Scope
    id: str


class Wanted(Protocol):
    """What requests that make a policy have in common."""

    @property
    def scope(self) -> int: ...
    @property
    def subject_id(self) -> str: ...
    @property
    def imposed(self) -> bool: ...
    @property
    def organisation_id(self) -> str: ...


async def choose_subject(unit: Unit, wanted: Wanted, scopes: Collection[Scope]) -> Subject:
    """What the request is about, which exists, and of which the caller may decide.

    Raises `HelixError`: PERMISSION_DENIED, NOT_FOUND for what is not in the organisation, UNPROCESSABLE; `param` names
    the field.
    """
    scope = parse_scope(wanted.scope, scopes)
    own = unit.caller.organisation_id
    if wanted.imposed or scope is Scope.INSTALLATION or wanted.organisation_id not in ("", own):
        check_may_impose(unit)
    if not wanted.imposed and scope is Scope.INSTALLATION:
        raise _bad("imposed", "What is on the installation can only be imposed.")
    if not wanted.imposed and wanted.organisation_id not in ("", own):
        raise _bad("imposed", "On another organisation it can only be imposed.")
    if scope is Scope.INSTALLATION:
        for param in ("organisation_id", "subject_id"):
            if getattr(wanted, param):
                raise _bad(param, "What is on the installation is on nothing else: leave this out.")
        return Subject("", scope, "")
    organisation_id = wanted.organisation_id or own
    if organisation_id != own:
        await check_organisation(unit, organisation_id)
    if scope is Scope.ORGANISATION:
        if wanted.subject_id not in ("", organisation_id):
            raise _missing("organisation", wanted.subject_id)
        return Subject(organisation_id, scope, organisation_id)
    if not wanted.subject_id:
        raise _bad("subject_id", f"Say on which {scope.name.lower()}.")
    await _check_is_there(unit, scope, wanted.subject_id, organisation_id)
    return Subject(organisation_id, scope, wanted.subject_id)


def parse_scope(number: int, scopes: Collection[Scope] = SCOPES) -> Scope:
    """Raises `HelixError` UNPROCESSABLE for one that is not among `scopes`."""
    for scope in scopes:
        if scope.value == number:
            return scope
    raise _bad("scope", f"This can be on: {', '.join(scope.name.lower() for scope in scopes)}.")


def check_may_impose(unit: Unit) -> None:
    """Whether the caller may decide over the heads of organisations. Raises `HelixError` PERMISSION_DENIED."""
    if not unit.caller.operator:
        needed = Permission.LIMITS_IMPOSE.value
        raise HelixError(ErrorKind.PERMISSION_DENIED, f"Not permitted: this needs the permission {needed}.")


async def check_organisation(unit: Unit, organisation_id: str) -> None:
    """Raises `HelixError` NOT_FOUND unless there is such an organisation. For operators."""
    rows = select(organisations.c.id).where(organisations.c.id == organisation_id, organisations.c.deleted_at.is_(None))
    if (await unit.connection.execute(rows)).first() is None:
        message = f"There is no organisation {organisation_id!r}."
        raise HelixError(ErrorKind.NOT_FOUND, message, param="organisation_id")


async def _check_is_there(unit: Unit, scope: Scope, subject_id: str, organisation_id: str) -> None:
    row = (await unit.connection.execute(_QUERIES[scope](subject_id, organisation_id))).first()
    if row is None:
        raise _missing(scope.name.lower(), subject_id)
    if scope is Scope.KEY:
        expired = row.expires_at is not None and unit.now >= row.expires_at
        # A bootstrap key that gave way to another one may come back.
        if expired or (row.revoked_at is not None and not row.superseded):
            raise _bad("subject_id", "This key is revoked or has expired.")


def _project(subject_id: str, organisation_id: str) -> "Select[Any]":
    return select(projects.c.id).where(
        projects.c.id == subject_id, projects.c.organisation_id == organisation_id, projects.c.deleted_at.is_(None)
    )


def _user(subject_id: str, organisation_id: str) -> "Select[Any]":
    """A member of the organisation, anywhere in it, or one of its service accounts."""
    member = exists().where(
        accounts.c.id == subject_id,
        accounts.c.deleted_at.is_(None),
        memberships.c.account_id == accounts.c.id,
        memberships.c.organisation_id == organisation_id,
    )
    program = exists().where(
        service_accounts.c.id == subject_id,
        service_accounts.c.organisation_id == organisation_id,
        service_accounts.c.deleted_at.is_(None),
    )
    return select(organisations.c.id).where(organisations.c.id == organisation_id, or_(member, program))


def _key(subject_id: str, organisation_id: str) -> "Select[Any]":
    own = and_(api_keys.c.id == subject_id, api_keys.c.organisation_id == organisation_id)
    return select(api_keys.c.expires_at, api_keys.c.revoked_at, api_keys.c.superseded).where(own)


_QUERIES: Final = {Scope.PROJECT: _project, Scope.USER: _user, Scope.KEY: _key}


def _missing(noun: str, subject_id: str) -> HelixError:
    return HelixError(ErrorKind.NOT_FOUND, f"There is no {noun} {subject_id!r}.", param="subject_id")


def _bad(param: str, message: str) -> HelixError:
    return HelixError(ErrorKind.UNPROCESSABLE, message, param=param)
