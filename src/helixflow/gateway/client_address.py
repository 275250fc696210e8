"""Where a request comes from."""

import ipaddress
from collections.abc import Sequence
from typing import Final

from helixflow.core.principal import Network
from helixflow.gateway.exchange import Exchange

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# No chain of proxies is longer; a client's list may be.
MAX_HOPS: Final = 16


class ClientAddresses:
    """Tells addresses of clients. What `X-Forwarded-For` says counts where it was written by a trusted proxy."""

    def __init__(self, trusted_proxies: Sequence[Network]) -> None:
        self._trusted = tuple(trusted_proxies)

    def find(self, exchange: Exchange) -> Address | None:
        """The peer's address; if that is a trusted proxy's, the right-most address of `X-Forwarded-For` that is none.

        The peer's too where the header is missing or not what a proxy writes. None for a peer without an address.
        """
        client = exchange.scope.get("client")
        if client is None:
            return None
        peer = parse_address(client[0])
        if peer is None or not self._is_trusted(peer) or b"x-forwarded-for" not in exchange.headers:
            return peer
        lines = [value for name, value in exchange.scope["headers"] if name == b"x-forwarded-for"]
        hops = b",".join(lines).rsplit(b",", MAX_HOPS)[-MAX_HOPS:]
        address = peer
        for hop in reversed(hops):
            found = parse_address(hop.decode("latin-1").strip(" \t"))
            if found is None:
                return peer
            address = found
            if not self._is_trusted(found):
                break
        return address

    def _is_trusted(self, address: Address) -> bool:
        return is_within(address, self._trusted)


def parse_address(text: str) -> Address | None:
    """The address, an IPv4 one also where it is written as IPv6 (`::ffff:192.0.2.1`); None for anything else."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.scope_id is not None:  # which of our interfaces it came in by
            return ipaddress.IPv6Address(int(address))
    return address


def is_within(address: Address, networks: Sequence[Network]) -> bool:
    """Whether one of the networks holds the address."""
    return any(address in network for network in networks)
