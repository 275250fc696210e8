"""Listening sockets, opened once and handed to every generation of gateways."""

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Final, Literal

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.serving import PoolSettings
from helixflow.settings.tree import GatewaySettings

_BACKLOG: Final = 2048


@dataclass(frozen=True, slots=True)
class Listeners:
    """The two sockets of a gateway: plain HTTP on loopback, and HTTPS."""

    http: socket.socket
    https: socket.socket


def open_listeners(settings: GatewaySettings) -> Listeners:
    """Binds both ports and listens, so that nobody is refused while a gateway starts.

    Raises `UserError`: PORT_BUSY when another program has a port, CONFIG when an address cannot be had.
    """
    http = _open(settings.host, settings.http_port, "gateway", "host", "http_port")
    try:
        https = _open(settings.https_host, settings.https_port, "gateway", "https_host", "https_port")
    except UserError:
        http.close()
        raise
    return Listeners(http, https)


def open_data_port(settings: PoolSettings) -> socket.socket:
    """The listener of a pool's relay. Raises as `open_listeners`."""
    return _open(settings.host, settings.data_port, "pool", "host", "data_port")


def is_loopback(host: str) -> bool:
    """Whether an address, or a name, is for this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def base_url(listener: socket.socket, scheme: Literal["http", "https"] = "http") -> str:
    """Where clients on this machine reach it: `http://host:port`."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _open(host: str, port: int, section: str, host_setting: str, port_setting: str) -> socket.socket:
    host = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use by another program; choose another one with "
                f"--{port_setting.replace('_', '-')}, {section}.{port_setting} in the configuration or "
                f"HELIXFLOW_{section.upper()}__{port_setting.upper()}",
                ExitCode.PORT_BUSY,
            ) from exc
        reason = f"cannot listen on {host} port {port}: {exc.strerror}"
        raise UserError(
            f"{reason}; change {section}.{host_setting} or {section}.{port_setting}", ExitCode.CONFIG
        ) from exc
    return listener
