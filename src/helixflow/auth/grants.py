"""What an account, service account or key may do now: its roles, and the permissions behind them."""

from collections.abc import Awaitable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sqlalchemy import Row, Select, bindparam, select

from helixflow.core.permissions import ROLE_PERMISSIONS, ROLES, Grants, Permission, parse_permission
from helixflow.storage.schema import memberships, projects, roles


@dataclass(frozen=True, slots=True)
class Held:
    """The roles of somebody in one organisation, and what they allow. `roles` are those in the organisation itself."""

    grants: Grants
    roles: tuple[str, ...] = ()


ALL = Held(Grants(ROLE_PERMISSIONS), ("owner",))
NOTHING = Held(Grants())


# Built once: making a statement takes longer than to run it.
_MEMBERSHIPS: Final = (
    select(memberships.c.project_id, memberships.c.role)
    .outerjoin(projects, projects.c.id == memberships.c.project_id)
    .where(
        memberships.c.account_id == bindparam("account_id"),
        memberships.c.organisation_id == bindparam("organisation_id"),
        projects.c.deleted_at.is_(None),
    )
)
_CUSTOM_ROLES: Final = select(roles.c.name, roles.c.permissions).where(
    roles.c.organisation_id == bindparam("organisation_id"), roles.c.name.in_(bindparam("names", expanding=True))
)


class Rows(Protocol):
    """As much of a result as is used here."""

    def first(self) -> Row[Any] | None: ...

    def __iter__(self) -> Iterator[Row[Any]]: ...


class Reader(Protocol):
    """A connection, or what else runs single SELECTs."""

    def execute(self, statement: Select[Any], parameters: dict[str, Any] | None = None, /) -> Awaitable[Rows]: ...


async def grants_of_account(reader: Reader, account_id: str, organisation_id: str) -> Held | None:
    """What an account may do in an organisation, None when it is no member. Deleted projects do not count."""
    parameters = {"account_id": account_id, "organisation_id": organisation_id}
    found = [(row.project_id, row.role) for row in await reader.execute(_MEMBERSHIPS, parameters)]
    if not found:
        return None
    return _held(found, await _custom_roles(reader, organisation_id, (role for _, role in found)))


async def grants_of_role(reader: Reader, organisation_id: str, project_id: str, role: str) -> Held:
    """What a role allows in a project, or with '' in the whole organisation: for service accounts."""
    return _held([(project_id, role)], await _custom_roles(reader, organisation_id, (role,)))


async def permissions_of_role(reader: Reader, organisation_id: str, role: str) -> frozenset[Permission] | None:
    """The permissions of a built-in role or one of the organisation's own; None when there is no such role."""
    if role in ROLES:
        return ROLES[role]
    return (await _custom_roles(reader, organisation_id, (role,))).get(role)


def parse_scopes(names: Iterable[str]) -> frozenset[Permission]:
    """The permissions among `names`; what an older or newer version called otherwise allows nothing."""
    return frozenset(permission for name in names if (permission := parse_permission(name)) is not None)


async def _custom_roles(
    reader: Reader, organisation_id: str, names: Iterable[str]
) -> Mapping[str, frozenset[Permission]]:
    wanted = sorted({name for name in names if name not in ROLES})
    if not wanted:
        return {}
    found = await reader.execute(_CUSTOM_ROLES, {"organisation_id": organisation_id, "names": wanted})
    return {row.name: parse_scopes(row.permissions) & ROLE_PERMISSIONS for row in found}


def _held(found: Iterable[tuple[str, str]], custom: Mapping[str, frozenset[Permission]]) -> Held:
    everywhere: frozenset[Permission] = frozenset()
    single: dict[str, frozenset[Permission]] = {}
    names = []
    for project_id, role in found:
        # A role that is gone allows nothing.
        held = ROLES.get(role) or custom.get(role, frozenset())
        if project_id:
            single[project_id] = held
        else:
            everywhere = held
            names.append(role)
    return Held(Grants(everywhere, single), tuple(names))
