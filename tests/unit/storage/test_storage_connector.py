"""How failed attempts to connect to PostgreSQL are told and spaced. No socket is opened."""

import socket
import ssl
from typing import Any

import asyncpg
import pytest

from helixflow.core.clock import FakeClock
from helixflow.storage.address import Address
from helixflow.storage.connector import Connector
from helixflow.storage.failures import Unreachable


class Attempts:
    """Stands in for asyncpg.connect: counts, and fails as it is told."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure
        self.count = 0
        self.arguments: dict[str, Any] = {}

    async def __call__(self, **arguments: Any) -> None:
        self.count += 1
        self.arguments = arguments
        raise self.failure


def connector(clock: FakeClock) -> Connector:
    address = Address.parse("postgresql://u@localhost/d")
    return Connector(address, "the-password", {}, command_timeout_s=1.0, monotonic=clock.monotonic)


@pytest.mark.parametrize(
    ("failure", "words", "passing"),
    [
        (ConnectionRefusedError(111, "refused"), "nothing listens there", True),
        (OSError("Multiple exceptions: [Errno 111], [Errno 111]"), "nothing listens there", True),
        (FileNotFoundError(2, "no socket"), "nothing listens there", True),
        (TimeoutError(), "nothing answered within 3 s", True),
        (socket.gaierror(-2, "unknown"), "host name cannot be resolved", True),
        (ConnectionResetError(104, "reset"), "closed the connection", True),
        (ConnectionError('PostgreSQL server at "h" rejected SSL upgrade'), "offers no TLS", False),
        (PermissionError(13, "denied"), "permissions of the socket's folder", False),
        (ssl.SSLError(1, "handshake"), "TLS failed", False),
        (asyncpg.InvalidPasswordError("for user u with the-password"), "password was refused", False),
        (asyncpg.InvalidAuthorizationSpecificationError("pg_hba"), "pg_hba.conf", False),
        (asyncpg.InvalidCatalogNameError("d"), "no such database", False),
        (asyncpg.TooManyConnectionsError("too many"), "max_connections", True),
        (asyncpg.CannotConnectNowError("starting"), "starting up", True),
        (asyncpg.ConnectionDoesNotExistError("gone"), "connection was lost", True),
        (asyncpg.InterfaceError("odd"), "look at its log", False),
    ],
)
async def test_each_failure_has_a_reason_without_the_password(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, words: str, passing: bool
) -> None:
    monkeypatch.setattr("asyncpg.connect", Attempts(failure))
    with pytest.raises(Unreachable, match=words) as caught:
        await connector(FakeClock()).connect()
    assert caught.value.reason.passing is passing
    assert "the-password" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_failures_are_repeated_without_asking_until_a_growing_pause_has_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = Attempts(ConnectionRefusedError())
    monkeypatch.setattr("asyncpg.connect", attempts)
    clock = FakeClock()
    opening = connector(clock)
    for _ in range(600):
        with pytest.raises(Unreachable, match="nothing listens"):
            await opening.connect()
        clock.advance(0.01)
    # Six seconds: 50, 100, 200, 400, 800 ms and then a second each time, a quarter less at most.
    assert 8 <= attempts.count <= 14
    clock.advance(1.0)
    attempts.failure = asyncpg.InvalidPasswordError()
    with pytest.raises(Unreachable, match="password"):
        await opening.connect()


async def test_nothing_is_taken_from_the_drivers_own_variables_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(ConnectionRefusedError())
    monkeypatch.setattr("asyncpg.connect", attempts)
    address = Address.parse("postgresql://u@localhost/d")
    with pytest.raises(Unreachable):
        await Connector(address, "", {}, command_timeout_s=None).connect()
    assert all(attempts.arguments[name] is not None for name in ("host", "port", "user", "database", "password", "ssl"))
    assert 0 < attempts.arguments["timeout"] <= 5
