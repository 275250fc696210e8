"""What an API key may be restricted to: scopes, models, networks and time, as a request gives them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Row

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import (
    DEFAULT_SCOPES,
    INSTALLATION_PERMISSIONS,
    OPERATOR_SCOPES,
    Permission,
    parse_permission,
)
from helixflow.rpc.access import Level, declared_access
from helixflow.rpc.generated.auth_v1 import admin_pb2, usage_pb2
from helixflow.settings.section import Name

MAX_ENTRIES: Final = 100
# The end of the year 9999: later dates cannot be written in ISO 8601.
_MAX_TIME: Final = 253_402_300_799
_MAX_NETWORK_CHARS: Final = 50
_MODEL_NAME: Final = TypeAdapter(Name)


@dataclass(frozen=True, slots=True)
class Restrictions:
    """Of one key; `models` and `networks` empty and `expires_at` None for none. In canonical form and order."""

    models: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    expires_at: int | None = None

    @classmethod
    def of(cls, row: Row[Any]) -> "Restrictions":
        """Those of a row of `api_keys`."""
        return cls(tuple(row.models), tuple(row.networks), row.expires_at)

    def check_covers(self, other: "Restrictions") -> None:
        """Raises `HelixError` PERMISSION_DENIED where a key with `other` could be used beyond this one."""
        if self.models and not (other.models and set(self.models).issuperset(other.models)):
            raise _beyond("models", "for other models")
        if self.networks and not (other.networks and all(self._has_network(network) for network in other.networks)):
            raise _beyond("networks", "from other networks")
        if self.expires_at is not None and (other.expires_at is None or other.expires_at > self.expires_at):
            raise _beyond("expires_at", "for longer")

    def _has_network(self, text: str) -> bool:
        network = ip_network(text)
        return any(_contains(ip_network(own), network) for own in self.networks)


def parse_scopes_given(names: Sequence[str], *, operator: bool) -> frozenset[Permission]:
    """The permissions of these names. Raises `HelixError` UNPROCESSABLE for one that no key can have, or that only an
    `operator` can give it.
    """
    _check_count(names, "scopes")
    found = set()
    for name in names:
        permission = parse_permission(name)
        if permission is None:
            raise _bad("scopes", f"There is no permission {_shown(name)}.")
        if permission in OPERATOR_SCOPES and not operator:
            raise _bad("scopes", f"{name}: only operators of the installation can give this to a key.")
        if permission in INSTALLATION_PERMISSIONS - OPERATOR_SCOPES:
            raise _bad("scopes", f"{name} is for operators of the installation; no key can have it.")
        found.add(permission)
    return frozenset(found)


def check_effective_in_project(scopes: Iterable[Permission]) -> None:
    """Raises `HelixError` UNPROCESSABLE for scopes that nothing ever asks for in a single project."""
    if useless := sorted(set(scopes) - permissions_in_projects()):
        message = f"{', '.join(useless)}: would have no effect, since this key holds in its project only."
        raise _bad("scopes", message + " Make it for somebody with a role in the organisation.")


@cache
def permissions_in_projects() -> frozenset[Permission]:
    """What can be granted in one project: using models, and what RPCs at that level declare."""
    services = (
        admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
        usage_pb2.DESCRIPTOR.services_by_name["UsageService"],
    )
    found = (access for service in services for _, access in declared_access(service))
    declared = (access for access in found if access.level is Level.PROJECT)
    return DEFAULT_SCOPES.union(access.permission for access in declared if access.permission is not None)


def parse_models(names: Sequence[str]) -> tuple[str, ...]:
    """Sorted, each once. Raises `HelixError` UNPROCESSABLE for what can be no model's name."""
    _check_count(names, "models")
    for name in names:
        try:
            _MODEL_NAME.validate_python(name)
        except ValidationError as exc:
            raise _bad("models", f"{_shown(name)} is not the name of a model.") from exc
    return tuple(sorted(set(names)))


def parse_networks(texts: Sequence[str]) -> tuple[str, ...]:
    """Networks in canonical form, each once; a single address becomes a network of one.

    Raises `HelixError` UNPROCESSABLE for what is none, and for an address within a network (10.0.0.1/8): it is not
    clear which of the two was meant.
    """
    _check_count(texts, "networks")
    return tuple(str(network) for network in sorted({_parse_network(text) for text in texts}, key=_order))


def parse_expiry(expires_at: int, now: int) -> int | None:
    """Seconds since the epoch, None for never (0). Raises `HelixError` UNPROCESSABLE unless it lies ahead."""
    if expires_at == 0:
        return None
    if not now < expires_at <= _MAX_TIME:
        raise _bad("expires_at", "The key must expire in the future (before the year 10000), or never (0).")
    return expires_at


def _parse_network(text: str) -> IPv4Network | IPv6Network:
    base, slash, prefix = text.partition("/")
    try:
        # Netmasks instead of lengths are left out, zones mean nothing elsewhere.
        if len(text) > _MAX_NETWORK_CHARS or "%" in base or (slash and not (prefix.isascii() and prefix.isdigit())):
            raise ValueError("neither address nor network")
        network = ip_network(text)
    except ValueError as exc:
        message = (
            f"{_shown(text)} is not a network such as 192.0.2.0/24 or 2001:db8::/32 (bits after the prefix are 0)."
        )
        raise _bad("networks", message) from exc
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise _bad("networks", f"{_shown(text)}: write IPv4 networks as such, for example 192.0.2.0/24.")
    return network


def _contains(outer: IPv4Network | IPv6Network, inner: IPv4Network | IPv6Network) -> bool:
    if isinstance(outer, IPv4Network):
        return isinstance(inner, IPv4Network) and inner.subnet_of(outer)
    return isinstance(inner, IPv6Network) and inner.subnet_of(outer)


def _order(network: IPv4Network | IPv6Network) -> tuple[int, int, int]:
    return network.version, int(network.network_address), network.prefixlen


def _check_count(entries: Sequence[str], param: str) -> None:
    if len(entries) > MAX_ENTRIES:
        raise _bad(param, f"At most {MAX_ENTRIES} {param}.")


def _shown(text: str) -> str:
    """What the caller wrote, as far as it can be repeated."""
    return repr(text if len(text) <= _MAX_NETWORK_CHARS else text[:_MAX_NETWORK_CHARS] + "…")


def _bad(param: str, message: str) -> HelixError:
    return HelixError(ErrorKind.UNPROCESSABLE, message, param=param)


def _beyond(param: str, how: str) -> HelixError:
    message = f"Not permitted: the key that makes this call is restricted; the other one could be used {how}."
    return HelixError(ErrorKind.PERMISSION_DENIED, message, param=param)
