"""Listening sockets, opened once and handed to every generation of gateways."""

import errno
import socket
from typing import Final

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.tree import GatewaySettings

_BACKLOG: Final = 2048


def open_listener(settings: GatewaySettings) -> socket.socket:
    """Binds the plain HTTP port and listens, so that nobody is refused while a gateway starts.

    Raises `UserError`: PORT_BUSY when another program has the port, CONFIG when the address cannot be had.
    """
    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, settings.http_port))
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {settings.http_port} on {host} is in use by another program; choose another one with "
                "--http-port, gateway.http_port in the configuration or HELIXFLOW_GATEWAY__HTTP_PORT",
                ExitCode.PORT_BUSY,
            ) from exc
        reason = f"cannot listen on {host} port {settings.http_port}: {exc.strerror}"
        raise UserError(f"{reason}; change gateway.host or gateway.http_port", ExitCode.CONFIG) from exc
    return listener


def base_url(listener: socket.socket) -> str:
    """Where clients reach it: `http://host:port`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
