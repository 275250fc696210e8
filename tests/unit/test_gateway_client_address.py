from ipaddress import ip_network
from typing import Any, cast

import pytest

from helixflow.gateway.client_address import MAX_HOPS, ClientAddresses
from helixflow.gateway.exchange import Exchange

PROXIES = ("10.0.0.0/8", "2001:db8:1::/48")


def find(peer: str | None, *lines: str, trusted: tuple[str, ...] = PROXIES) -> str | None:
    scope = {
        "method": "GET",
        "path": "/",
        "headers": [(b"host", b"h"), *((b"x-forwarded-for", line.encode("latin-1")) for line in lines)],
        "client": (peer, 1234) if peer is not None else None,
    }
    exchange = Exchange(scope, cast(Any, None), cast(Any, None))
    address = ClientAddresses([ip_network(network) for network in trusted]).find(exchange)
    return str(address) if address is not None else None


@pytest.mark.parametrize(
    ("peer", "lines", "client"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        # Only a trusted proxy is believed.
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
        ("127.0.0.1", ["198.51.100.7"], "127.0.0.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        # What a client wrote itself stands to the left of what the proxies added.
        ("10.0.0.1", ["10.9.9.9, 203.0.113.5, 198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.7, 10.0.0.2 ,10.0.0.3"], "198.51.100.7"),
        ("10.0.0.1", ["nonsense, 198.51.100.7"], "198.51.100.7"),
        # Several headers are one list.
        ("10.0.0.1", ["1.1.1.1", "198.51.100.7", "10.0.0.2"], "198.51.100.7"),
        ("10.0.0.1", ["10.0.0.9, 10.0.0.2"], "10.0.0.9"),
        ("2001:db8:1::1", ["2001:db8:2::7"], "2001:db8:2::7"),
        # IPv4 on a socket of both kinds.
        ("::ffff:192.0.2.1", [], "192.0.2.1"),
        ("::ffff:10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
        ("fe80::1%eth0", [], "fe80::1"),
        # Not what a proxy writes.
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7,"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7:4711"], "10.0.0.1"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["_hidden, 10.0.0.3"], "10.0.0.1"),
        ("10.0.0.1", ["3325256711"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.07"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7\xa0"], "10.0.0.1"),
        (None, ["198.51.100.7"], None),
    ],
)
def test_the_client_is_the_last_that_no_proxy_of_ours_is(
    peer: str | None, lines: list[str], client: str | None
) -> None:
    assert find(peer, *lines) == client


def test_without_trusted_proxies_the_header_is_nothing() -> None:
    assert find("10.0.0.1", "198.51.100.7", trusted=()) == "10.0.0.1"


def test_an_endless_list_is_not_walked() -> None:
    assert find("10.0.0.1", ", ".join(["198.51.100.7"] + ["10.0.0.2"] * (MAX_HOPS - 1))) == "198.51.100.7"
    assert find("10.0.0.1", ", ".join(["198.51.100.7"] + ["10.0.0.2"] * 5000)) == "10.0.0.2"
