"""Who calls: the identity behind an API key or an access token, and what it may do."""

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from helixflow.core.permissions import Permission

Network = IPv4Network | IPv6Network
# Of a key in its organisation, and of an organisation among all.
DEFAULT_WEIGHT: Final = 100


class PrincipalKind(Enum):
    """What a principal is identified by."""

    KEY = "key"
    ACCOUNT = "account"


@dataclass(frozen=True, slots=True)
class Principal:
    """An identity as a gateway sees it.

    `id` is the key's or the account's; `owner_id` the account or service account that a key acts for, empty for a key
    of the project itself. `project_id` is empty for a token that is for no project. `permissions` hold in that project
    (without one: in the organisation); those of the installation hold in it. `models` and `networks` are restrictions,
    None for none. Waiting requests are served by `priority` (higher first), then in proportion to
    `organisation_weight` and, within an organisation, `weight`. `residency` is the only region that may serve its
    calls, empty for any.
    """

    kind: PrincipalKind
    id: str
    name: str
    organisation_id: str
    project_id: str
    owner_id: str = ""
    session_id: str = ""
    permissions: frozenset[Permission] = frozenset()
    models: frozenset[str] | None = None
    networks: tuple[Network, ...] | None = None
    priority: int = 0
    weight: int = DEFAULT_WEIGHT
    organisation_weight: int = DEFAULT_WEIGHT
    residency: str = ""

    def may(self, permission: Permission) -> bool:
        return permission in self.permissions
