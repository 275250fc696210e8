"""One address cannot keep the auth service busy with guesses."""

import ipaddress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.gateway.exchange import Exchange
from helixflow.gateway.sign_in_rate import SignInRate

LOGIN = "/api/v1/auth/login"
HOME = ipaddress.ip_address("192.0.2.1")


def attempt(path: str = LOGIN, method: str = "POST") -> Exchange:
    return cast(Exchange, SimpleNamespace(path=path, method=method))


def tries(rate: SignInRate, address: Any, count: int = 50) -> int:
    """How many of them get through."""
    through = 0
    for _ in range(count):
        try:
            rate.check(attempt(), address)
        except HelixError as exc:
            assert exc.kind is ErrorKind.TOO_MANY_ATTEMPTS
            assert exc.retry_after_s is not None
            assert 0 < exc.retry_after_s <= 60 / 6
        else:
            through += 1
    return through


def test_a_burst_then_the_rate() -> None:
    clock = FakeClock()
    rate = SignInRate(60, clock)
    assert tries(rate, HOME) == 10
    clock.advance(3)
    assert tries(rate, HOME) == 3


def test_addresses_count_apart_and_ipv6_by_network() -> None:
    rate = SignInRate(60, FakeClock())
    assert tries(rate, HOME) == 10
    assert tries(rate, ipaddress.ip_address("192.0.2.2")) == 10
    assert tries(rate, ipaddress.ip_address("2001:db8:0:1::1")) == 10
    assert tries(rate, ipaddress.ip_address("2001:db8:0:1:ffff::9")) == 0, "the same network"
    assert tries(rate, ipaddress.ip_address("2001:db8:0:2::1")) == 10


@pytest.mark.parametrize(("path", "method"), [("/api/v1/keys", "POST"), (LOGIN, "GET"), ("/api/v1/authors", "POST")])
def test_other_requests_are_not_counted(path: str, method: str) -> None:
    rate = SignInRate(6, FakeClock())
    for _ in range(50):
        rate.check(attempt(path, method), HOME)


def test_a_peer_without_an_address_is_this_machine() -> None:
    assert tries(SignInRate(6, FakeClock()), None) == 50


def test_addresses_are_forgotten_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixflow.gateway.sign_in_rate._MAX_ADDRESSES", 3)
    rate = SignInRate(6, FakeClock())
    for number in range(20):
        assert tries(rate, ipaddress.ip_address(number + 1), 5) == 1
    assert len(rate._buckets) == 3
