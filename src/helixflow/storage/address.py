"""The URL of a PostgreSQL database: where it is, who we are there, and how TLS is done."""

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from helixflow.core.errors import ExitCode, UserError

_PORT: Final = 5432
# libpq's names (section 34.1.2 of PostgreSQL's manual); `ssl` is asyncpg's word for `sslmode`.
_PARAMETERS: Final = ("host", "ssl", "sslmode", "sslrootcert", "sslcert", "sslkey")
_MODES: Final = ("disable", "require", "verify-ca", "verify-full")
_BOOLEANS: Final = {"true": "require", "false": "disable"}


@dataclass(frozen=True, slots=True)
class Address:
    """`host` beginning with `/` is the folder of a Unix socket. `mode` is one of libpq's `sslmode`s."""

    host: str
    port: int
    database: str
    user: str
    mode: str
    # None: those of the system.
    root_certificates: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @property
    def name(self) -> str:
        """For messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"postgresql://{host}:{self.port}/{self.database}"

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises `UserError` (CONFIG) for what is missing, unknown or contradicts itself."""
        try:
            parts = urlsplit(url)
            port = parts.port if parts.port is not None else _PORT
        except ValueError as exc:
            raise _wrong("it is no URL of the form postgresql://user@host:port/name") from exc
        parameters = _read_parameters(parts.query)
        database = unquote(parts.path.removeprefix("/"))
        user = unquote(parts.username or "")
        host = parameters.get("host") or unquote(parts.hostname or "") or "localhost"
        if not user:
            raise _wrong("it names no user: postgresql://user@host:port/name")
        if not database or "/" in database:
            raise _wrong("it names no database: postgresql://user@host:port/name")
        return cls(
            host=host,
            port=port,
            database=database,
            user=user,
            mode=_mode_of(parameters, host),
            root_certificates=_path(parameters, "sslrootcert"),
            certificate=_path(parameters, "sslcert"),
            key=_path(parameters, "sslkey"),
        )

    def tls(self) -> ssl.SSLContext | None:
        """None for a connection in the clear. Reads certificates; raises `UserError` (CONFIG)."""
        if self.mode == "disable" or self.host.startswith("/"):
            return None
        context = self._trusting()
        # As libpq does: `require` checks the certificate once it is said against what.
        if self.mode == "require" and self.root_certificates is None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        else:
            context.check_hostname = self.mode == "verify-full"
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate, self.key, password="")
            except OSError as exc:
                message = f"sslcert: no certificate with its unencrypted key can be read from {self.certificate}"
                raise _wrong(message) from exc
        return context

    def _trusting(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.root_certificates)
        except OSError as exc:
            message = f"sslrootcert: no certificates (PEM) can be read from {self.root_certificates}"
            raise _wrong(message) from exc


def _read_parameters(query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _PARAMETERS:
            raise _wrong(f"unknown parameter {name!r}; there are {', '.join(_PARAMETERS)}")
        if name in parameters:
            raise _wrong(f"the parameter {name!r} is there twice")
        if not value:
            raise _wrong(f"the parameter {name!r} is empty")
        parameters[name] = value
    if "ssl" in parameters and "sslmode" in parameters:
        raise _wrong("give ssl or sslmode, not both")
    if "sslkey" in parameters and "sslcert" not in parameters:
        raise _wrong("sslkey needs sslcert")
    return parameters


def _mode_of(parameters: dict[str, str], host: str) -> str:
    """Beyond this machine a connection is private and the server is known, unless the URL says otherwise."""
    given = parameters.get("sslmode", parameters.get("ssl"))
    if given is None:
        return "disable" if _is_local(host) else "verify-full"
    mode = _BOOLEANS.get(given, given)
    if mode not in _MODES:
        raise _wrong(f"sslmode is one of {', '.join(_MODES)}, not {given!r}")
    return mode


def _is_local(host: str) -> bool:
    if host.startswith("/") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _path(parameters: dict[str, str], name: str) -> Path | None:
    return Path(parameters[name]).expanduser() if name in parameters else None


def _wrong(reason: str) -> UserError:
    return UserError(f"database.url: {reason}", ExitCode.CONFIG)
