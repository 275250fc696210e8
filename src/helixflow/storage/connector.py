"""Opens connections to PostgreSQL: within a bounded time, with pauses while nothing answers, and with a reason."""

import random
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Final

import asyncpg

from helixflow.storage.address import Address
from helixflow.storage.failures import Reason, Unreachable, reason_of

CONNECT_TIMEOUT_S: Final = 3.0
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_SILENT: Final = Reason(
    f"nothing answered within {CONNECT_TIMEOUT_S:.0f} s; check host, port and firewall", passing=True
)
_REFUSED: Final = Reason("nothing listens there; is PostgreSQL running, and are host and port right?", passing=True)
_CLOSED: Final = Reason("it closed the connection while that was being opened", passing=True)


class Connector:
    """Gives connections of one kind. After a failure it says so again, at once, until a pause has passed.

    The pause grows from 50 ms to 1 s, so that neither callers wait nor a server that comes back is run over.
    """

    def __init__(
        self,
        address: Address,
        password: str,
        session: Mapping[str, str],
        *,
        command_timeout_s: float | None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._password = password
        self._session = dict(session)
        self._command_timeout_s = command_timeout_s
        self._monotonic = monotonic
        self._tls = address.tls()
        self._pause_s = 0.0
        self._paused_until = 0.0
        self._reason: Reason | None = None

    async def connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        """A fresh connection within `CONNECT_TIMEOUT_S`. Raises `Unreachable`."""
        if self._reason is not None and self._monotonic() < self._paused_until:
            raise Unreachable(self._reason)
        try:
            connection = await self._open()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
            reason = _reason_of(exc)
            self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, self._pause_s * 2))
            self._paused_until = self._monotonic() + self._pause_s * (1 - 0.25 * random.random())
            self._reason = reason
            raise Unreachable(reason) from exc
        self._reason = None
        self._pause_s = 0.0
        return connection

    async def _open(self) -> "asyncpg.Connection[asyncpg.Record]":
        address = self._address
        connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
            host=address.host,
            port=address.port,
            user=address.user,
            database=address.database,
            # Empty instead of None: else the driver looks for one in its own variables and files.
            password=self._password,
            ssl=self._tls if self._tls is not None else False,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=self._command_timeout_s,
            server_settings=self._session,
        )
        encoding = connection.get_settings().server_encoding
        if encoding != "UTF8":
            connection.terminate()
            raise Unreachable(Reason(f"its encoding is {encoding}; make it anew with ENCODING 'UTF8'"))
        return connection


def _reason_of(exc: Exception) -> Reason:
    """The most telling reason for a failed attempt; `exc` comes from the system, from TLS or from the server."""
    if isinstance(exc, TimeoutError):
        return _SILENT
    if isinstance(exc, ssl.SSLCertVerificationError):
        return Reason(
            f"its certificate is not trusted ({exc.verify_message}); name the right authority with sslrootcert, "
            "or correct the host"
        )
    if isinstance(exc, ssl.SSLError):
        return Reason("TLS failed; check the certificates of the server and sslcert")
    if isinstance(exc, ConnectionError) and "rejected SSL upgrade" in str(exc):
        return Reason("it offers no TLS; turn that on there, or add ?sslmode=disable where the network is private")
    if isinstance(exc, socket.gaierror):
        return Reason("its host name cannot be resolved; correct the host", passing=True)
    if isinstance(exc, PermissionError):
        return Reason("access to its socket was denied; check the permissions of the socket's folder")
    if isinstance(exc, ConnectionResetError | BrokenPipeError):
        return _CLOSED
    if isinstance(exc, OSError):
        return _REFUSED
    return reason_of(exc) or Reason("it refused the connection; look at its log")
