"""From what the auth service says of an identity to a `Principal`."""

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import structlog

from helixflow.core.permissions import Permission, parse_permission
from helixflow.core.principal import DEFAULT_WEIGHT, Network, Principal, PrincipalKind
from helixflow.rpc.generated.auth_v1 import identity_pb2

_NONE: Final[frozenset[Permission]] = frozenset()

log = structlog.get_logger("helixflow.clients")


@lru_cache(maxsize=1024)
def parse_permissions(names: tuple[str, ...]) -> frozenset[Permission]:
    """The permissions of these names; those that only a newer version knows are left out.

    Remembered, so that the hundred thousand keys of a full cache share a few sets.
    """
    found = (parse_permission(name) for name in names)
    return frozenset(permission for permission in found if permission is not None) or _NONE


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Raises `ValueError` for what is no network."""
    return tuple(ipaddress.ip_network(text) for text in texts)


def principal_of_key(answer: identity_pb2.ResolveKeyResponse) -> Principal:
    """The identity behind a key. One with a network that cannot be read is usable from nowhere."""
    networks: tuple[Network, ...] | None = None
    if answer.networks:
        try:
            networks = parse_networks(answer.networks)
        except ValueError:
            log.error("key.unusable", key_id=answer.key_id, reason="one of its networks cannot be read")
            networks = ()
    return Principal(
        kind=PrincipalKind.KEY,
        id=answer.key_id,
        name=answer.key_name,
        organisation_id=answer.organisation_id,
        project_id=answer.project_id,
        owner_id=answer.owner_id,
        permissions=parse_permissions(tuple(answer.permissions)),
        models=frozenset(answer.models) if answer.models else None,
        networks=networks,
        priority=answer.priority,
        # 0 comes from an auth service that is older than shares.
        weight=answer.weight or DEFAULT_WEIGHT,
        organisation_weight=answer.organisation_weight or DEFAULT_WEIGHT,
        residency=answer.residency,
    )
