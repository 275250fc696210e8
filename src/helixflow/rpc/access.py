"""Who may call an RPC, as its proto declares it, and the metadata that says who calls."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from helixflow.core.permissions import Permission
from helixflow.rpc.generated.auth_v1 import access_pb2

# `Bearer <access token or API key>`, as in HTTP.
AUTHORIZATION: Final = "authorization"
IDEMPOTENCY_KEY: Final = "idempotency-key"
REQUEST_ID: Final = "x-request-id"
# Percent-encoded where it is not ASCII: metadata is.
CLIENT_ADDRESS: Final = "x-forwarded-for"
CLIENT_SOFTWARE: Final = "x-client-software"


class Level(Enum):
    """At which level the permission is needed; see proto/helixflow/auth/v1/access.proto."""

    PUBLIC = access_pb2.LEVEL_PUBLIC
    SELF = access_pb2.LEVEL_SELF
    PROJECT = access_pb2.LEVEL_PROJECT
    ORGANISATION = access_pb2.LEVEL_ORGANISATION
    INSTALLATION = access_pb2.LEVEL_INSTALLATION
    SERVICE = access_pb2.LEVEL_SERVICE


@dataclass(frozen=True, slots=True)
class Access:
    """What one RPC declares. `permission` is None where the level needs none."""

    level: Level
    permission: Permission | None
    writes: bool
    idempotent: bool


def access_of(method: MethodDescriptor) -> Access:
    """Raises `ValueError` for an RPC that declares nothing, or something contradictory: it must not be served."""
    declared = method.GetOptions().Extensions[access_pb2.access]
    if declared.level == access_pb2.LEVEL_UNSPECIFIED:
        raise ValueError(f"{method.full_name} does not declare who may call it")
    level = Level(declared.level)
    needs_permission = level in (Level.PROJECT, Level.ORGANISATION, Level.INSTALLATION)
    if needs_permission != bool(declared.permission):
        raise ValueError(f"{method.full_name}: {level.name} {'needs a' if needs_permission else 'takes no'} permission")
    permission = Permission(declared.permission) if declared.permission else None
    return Access(level, permission, declared.writes, declared.idempotent)


def declared_access(service: ServiceDescriptor) -> Iterator[tuple[MethodDescriptor, Access]]:
    """Every RPC of a service with its declaration."""
    for method in service.methods:
        yield method, access_of(method)
