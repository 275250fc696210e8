"""The names in certificates: `spiffe://<trust domain>/<service>` for who a peer is, DNS names for who answers."""

import hashlib
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from helixflow.core.errors import ExitCode, UserError

# `control` is auth and pool in one process; `console` is the admin REST, which calls auth as itself; `shipper` brings
# the journals of a node's gateways to the ledger.
SERVICES: Final = ("gateway", "control", "auth", "pool", "console", "monitoring", "shipper")
# The certificate of the HTTPS listener: for browsers and SDKs, and no identity among services.
HTTPS: Final = "https"

_ROLES: Final[dict[str, tuple[str, ...]]] = {"control": ("auth", "pool")}
# Below it every replica has a name of its own, which says on a pool's data port which one is meant.
_REPLICAS: Final = "replica"
_DNS_NAME: Final = re.compile(
    r"(?=.{1,253}$)(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)
_SERVICE: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Names:
    """What a certificate is for; the order has no meaning."""

    uris: frozenset[str] = frozenset()
    dns: frozenset[str] = frozenset()
    addresses: frozenset[Address] = frozenset()

    def __or__(self, other: "Names") -> "Names":
        return Names(self.uris | other.uris, self.dns | other.dns, self.addresses | other.addresses)


def spiffe_id(trust_domain: str, service: str) -> str:
    return f"spiffe://{trust_domain}/{service}"


def parse_spiffe_id(uri: str) -> tuple[str, str]:
    """Trust domain and service. Raises `ValueError` when `uri` is no identity of ours, whatever its trust domain."""
    parts = urlsplit(uri)
    service = parts.path.removeprefix("/")
    if uri != f"spiffe://{parts.netloc}/{service}" or not parts.netloc or _SERVICE.fullmatch(service) is None:
        raise ValueError("not a SPIFFE identity of a service")
    return parts.netloc, service


def server_name(trust_domain: str, service: str) -> str:
    """The DNS name that a client checks when it calls `service`, wherever that listens."""
    return f"{service}.{trust_domain}"


def replica_server_name(trust_domain: str, replica_id: str) -> str:
    """The DNS name that means a replica on the data port of its pool, and that a gateway checks there."""
    digest = hashlib.sha256(replica_id.encode()).hexdigest()[:32]
    return server_name(trust_domain, f"{digest}.{_REPLICAS}")


def service_names(trust_domain: str, service: str) -> Names:
    """The names of a service's certificate. A process that plays several services answers to all their DNS names, and
    a pool to those of all its replicas.
    """
    answers_to = (service, *_ROLES.get(service, ()))
    dns = {server_name(trust_domain, one) for one in answers_to} | {"localhost"}
    if service == "pool":
        dns.add(server_name(trust_domain, f"*.{_REPLICAS}"))
    return Names(uris=frozenset({spiffe_id(trust_domain, service)}), dns=frozenset(dns))


def https_names(configured: Iterable[str], host: str) -> Names:
    """The names of the HTTPS certificate: loopback, this host's name, the listener's address, and the configured ones.

    Raises `UserError` (CONFIG) for a configured name that is neither a DNS name nor an address.
    """
    found = parse_names(["localhost", "127.0.0.1", "::1"]) | parse_names(configured)
    for own in (socket.gethostname(), host):
        try:
            names = parse_names([own])
        except UserError:
            # A host may have a name that no certificate can carry.
            continue
        if not any(address.is_unspecified for address in names.addresses):
            found |= names
    return found


def parse_names(texts: Iterable[str]) -> Names:
    """DNS names (`*.` in front stands for one label) and IP addresses. Raises `UserError` (CONFIG)."""
    dns: set[str] = set()
    addresses: set[Address] = set()
    for text in texts:
        try:
            addresses.add(ipaddress.ip_address(text.strip("[]")))
            continue
        except ValueError:
            pass
        try:
            name = text.lower() if text.isascii() else text.encode("idna").decode().lower()
        except UnicodeError:
            name = ""
        if _DNS_NAME.fullmatch(name) is None:
            raise UserError(f"{text!r} is neither a DNS name nor an address", ExitCode.CONFIG)
        dns.add(name)
    return Names(dns=frozenset(dns), addresses=frozenset(addresses))
