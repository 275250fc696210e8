"""Who may do what: all permissions, the built-in roles, and what a role at one level means at another.

docs/reference/roles.md is generated from here. Which permission an operation needs is declared on its RPC
(proto/helixflow/auth/v1).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final


class Permission(StrEnum):
    """`noun:verb`. The value is what stands in tokens, scopes of keys and custom roles."""

    ORGANISATIONS_READ = "organisations:read"
    ORGANISATIONS_UPDATE = "organisations:update"
    ORGANISATIONS_DELETE = "organisations:delete"
    PROJECTS_READ = "projects:read"
    PROJECTS_CREATE = "projects:create"
    PROJECTS_UPDATE = "projects:update"
    PROJECTS_DELETE = "projects:delete"
    USERS_READ = "users:read"
    USERS_CREATE = "users:create"
    USERS_UPDATE = "users:update"
    USERS_SUSPEND = "users:suspend"
    USERS_DELETE = "users:delete"
    MEMBERS_READ = "members:read"
    MEMBERS_UPDATE = "members:update"
    ROLES_READ = "roles:read"
    ROLES_CREATE = "roles:create"
    ROLES_UPDATE = "roles:update"
    ROLES_DELETE = "roles:delete"
    SERVICE_ACCOUNTS_READ = "service_accounts:read"
    SERVICE_ACCOUNTS_CREATE = "service_accounts:create"
    SERVICE_ACCOUNTS_UPDATE = "service_accounts:update"
    SERVICE_ACCOUNTS_DELETE = "service_accounts:delete"
    KEYS_READ = "keys:read"
    KEYS_CREATE = "keys:create"
    KEYS_UPDATE = "keys:update"
    KEYS_REVOKE = "keys:revoke"
    SESSIONS_READ = "sessions:read"
    SESSIONS_REVOKE = "sessions:revoke"
    AUDIT_READ = "audit:read"
    AUDIT_EXPORT = "audit:export"
    LIMITS_READ = "limits:read"
    LIMITS_UPDATE = "limits:update"
    BUDGETS_READ = "budgets:read"
    BUDGETS_UPDATE = "budgets:update"
    PRICES_READ = "prices:read"
    USAGE_READ = "usage:read"
    MODELS_READ = "models:read"
    MODELS_USE = "models:use"
    # Of the installation, beyond organisations: held by operators, never by a role.
    ORGANISATIONS_CREATE = "organisations:create"
    ORGANISATIONS_LIST = "organisations:list"
    SIGNING_KEYS_ROTATE = "signing_keys:rotate"
    METRICS_READ = "metrics:read"
    LIMITS_IMPOSE = "limits:impose"
    PRICES_UPDATE = "prices:update"
    JOURNALS_CLOSE = "journals:close"
    CONFIGURATION_READ = "configuration:read"
    CONFIGURATION_UPDATE = "configuration:update"
    POOLS_READ = "pools:read"
    POOLS_UPDATE = "pools:update"

    __hash__ = str.__hash__  # Enum's own is Python, and on the hot path


P = Permission

INSTALLATION_PERMISSIONS: Final = frozenset(
    {
        P.ORGANISATIONS_CREATE,
        P.ORGANISATIONS_LIST,
        P.SIGNING_KEYS_ROTATE,
        P.METRICS_READ,
        P.LIMITS_IMPOSE,
        P.PRICES_UPDATE,
        P.JOURNALS_CLOSE,
        P.CONFIGURATION_READ,
        P.CONFIGURATION_UPDATE,
        P.POOLS_READ,
        P.POOLS_UPDATE,
    }
)
# Those of them that an operator may give to an API key, whoever it acts for.
OPERATOR_SCOPES: Final = frozenset({P.METRICS_READ})
# What a role, built in or custom, may hold.
ROLE_PERMISSIONS: Final = frozenset(Permission) - INSTALLATION_PERMISSIONS
DEFAULT_SCOPES: Final = frozenset({P.MODELS_READ, P.MODELS_USE})

_READS: Final = frozenset(
    {
        P.ORGANISATIONS_READ,
        P.PROJECTS_READ,
        P.MEMBERS_READ,
        P.ROLES_READ,
        P.SERVICE_ACCOUNTS_READ,
        P.KEYS_READ,
        P.LIMITS_READ,
        P.BUDGETS_READ,
        P.PRICES_READ,
        P.USAGE_READ,
    }
)

OWNER: Final = "owner"
ROLES: Final[Mapping[str, frozenset[Permission]]] = {
    OWNER: ROLE_PERMISSIONS,
    "admin": ROLE_PERMISSIONS - {P.ORGANISATIONS_DELETE},
    "developer": _READS
    | DEFAULT_SCOPES
    | {P.KEYS_CREATE, P.KEYS_UPDATE, P.KEYS_REVOKE, P.SERVICE_ACCOUNTS_CREATE, P.SERVICE_ACCOUNTS_UPDATE},
    "viewer": _READS | {P.USERS_READ, P.MODELS_READ},
    "billing": frozenset(
        {
            P.ORGANISATIONS_READ,
            P.PROJECTS_READ,
            P.LIMITS_READ,
            P.BUDGETS_READ,
            P.BUDGETS_UPDATE,
            P.PRICES_READ,
            P.USAGE_READ,
        }
    ),
    "auditor": _READS | {P.USERS_READ, P.SESSIONS_READ, P.AUDIT_READ, P.AUDIT_EXPORT},
}
ROLE_DESCRIPTIONS: Final[Mapping[str, str]] = {
    OWNER: "Everything, also deleting the organisation and making other owners.",
    "admin": "Everything but deleting the organisation and changing who owns it.",
    "developer": "Uses models, manages API keys and service accounts, sees usage.",
    "viewer": "Sees what there is, changes nothing, uses no model.",
    "billing": "Sees what was used and what it cost, sets budgets.",
    "auditor": "Sees what there is, reads and exports the audit log.",
}
_BY_VALUE: Final = {permission.value: permission for permission in Permission}


def parse_permission(value: str) -> Permission | None:
    """The permission of that name, None when there is none."""
    return _BY_VALUE.get(value)


@dataclass(frozen=True, slots=True)
class Grants:
    """What somebody may do in one organisation: everywhere in it, and beyond that in single projects by id."""

    organisation: frozenset[Permission] = frozenset()
    projects: Mapping[str, frozenset[Permission]] = field(default_factory=dict)

    def allows(self, permission: Permission, project_id: str | None = None) -> bool:
        """Whether it holds in that project, or with None in the whole organisation."""
        if permission in self.organisation:
            return True
        return project_id is not None and permission in self.projects.get(project_id, ())

    def allows_somewhere(self, permission: Permission) -> bool:
        return permission in self.organisation or any(permission in held for held in self.projects.values())

    def within(self, project_id: str | None) -> frozenset[Permission]:
        """All that holds in that project, or with None in the whole organisation."""
        return self.organisation | self.projects.get(project_id or "", frozenset())

    def restricted_to(self, scopes: frozenset[Permission]) -> "Grants":
        """What is left when only `scopes` count."""
        return Grants(self.organisation & scopes, {project: held & scopes for project, held in self.projects.items()})
