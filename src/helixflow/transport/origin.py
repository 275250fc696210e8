"""Where requests go: the key of a connection pool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port. `host` is lower case, an IPv6 address is without brackets.

    With the scheme `unix` (plain HTTP) `host` is the path of a Unix socket, and `port` 0. With `https` the server must
    show a certificate for `server_name`, if that is not empty, instead of `host`.
    """

    scheme: str
    host: str
    port: int
    server_name: str = ""

    @classmethod
    def parse(cls, url: str) -> tuple["Origin", str]:
        """The origin of a base URL and its path without trailing slash (`""` or `"/v1"`).

        Raises `ValueError` with a text meant for the person who wrote the URL.
        """
        if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in url):
            raise ValueError("the URL contains a space or a control character")
        parts = urlsplit(url)
        if parts.scheme not in _DEFAULT_PORTS:
            raise ValueError("the URL must begin with http:// or https://")
        if parts.username is not None or parts.password is not None:
            raise ValueError("the URL must not contain a user name or password; give the key in a setting of its own")
        if parts.query or parts.fragment:
            raise ValueError("the URL must not contain a query (?) or a fragment (#)")
        if not parts.hostname:
            raise ValueError("the URL has no host name")
        try:
            host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
        except UnicodeError as exc:
            raise ValueError("the host name of the URL is not a valid domain name") from exc
        try:
            port = parts.port
        except ValueError as exc:
            raise ValueError("the port of the URL must be a number from 1 to 65535") from exc
        if port == 0:
            raise ValueError("the port of the URL must be a number from 1 to 65535")
        if not parts.path.isascii():
            raise ValueError("the path of the URL must be ASCII; percent-encode other characters")
        return cls(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme]), parts.path.rstrip("/")

    @classmethod
    def unix(cls, path: Path) -> "Origin":
        """A server on a Unix socket."""
        return cls("unix", str(path), 0)

    @property
    def authority(self) -> str:
        """The value of the `Host` header: the port only where it is not the scheme's own (RFC 9110, section 7.2)."""
        if self.scheme == "unix":
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS.get(self.scheme) else f"{host}:{self.port}"
