"""Serves the app on listening sockets that `launch` opened, and drains it."""

import asyncio
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate

import uvicorn
from uvicorn.server import ServerState

from helixflow.gateway.app import App
from helixflow.gateway.outbox import Outbox
from helixflow.gateway.protocol import GatewayProtocol
from helixflow.settings.tree import GatewaySettings

_TICK_S = 0.5
_BACKLOG = 2048
_CLOSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket, non-blocking; with a context it speaks TLS. The context's certificate may change any time."""

    socket: socket.socket
    context: ssl.SSLContext | None = None


class GatewayServer:
    """uvicorn's protocol on given sockets; signals and the order of shutting down are `launch`'s business."""

    def __init__(self, app: App, settings: GatewaySettings, listeners: Sequence[Listener]) -> None:
        self._app = app
        self._settings = settings
        self._listeners = listeners
        self._state = ServerState()
        self._outbox = Outbox(lambda: app.in_flight)
        self._servers: list[asyncio.Server] = []
        self._config = uvicorn.Config(
            app,
            interface="asgi3",
            http=GatewayProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
        )
        self._config.load()

    async def start(self) -> None:
        """Connections are accepted from here on."""
        self._set_date()
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            tls = listener.context is not None
            server = await loop.create_server(
                self._protocol,
                sock=listener.socket,
                backlog=_BACKLOG,
                ssl=listener.context,
                # As long as a plain client has for its first head.
                ssl_handshake_timeout=self._settings.header_timeout_s if tls else None,
                # Also bounds how long a slow reader may take for the end of its last answer.
                ssl_shutdown_timeout=self._settings.stall_timeout_s if tls else None,
            )
            self._servers.append(server)

    async def run(self) -> None:
        """Housekeeping until cancelled: the Date header, and clients that are too slow."""
        loop = asyncio.get_running_loop()
        settings = self._settings
        while True:
            await asyncio.sleep(_TICK_S)
            self._set_date()
            now = loop.time()
            for connection in list(self._state.connections):
                if isinstance(connection, GatewayProtocol):
                    connection.cut_off(
                        now,
                        header_timeout_s=settings.header_timeout_s,
                        body_timeout_s=settings.body_timeout_s,
                        stall_timeout_s=settings.stall_timeout_s,
                        keep_alive_s=settings.keep_alive_s,
                    )

    async def drain(self) -> None:
        """New requests get 503 while running ones finish, for at most `drain_timeout_s`; then all connections close."""
        self._app.draining = True
        await self._until_idle(self._settings.drain_timeout_s)
        for server in self._servers:
            server.close()
        self._outbox.flush()
        for connection in list(self._state.connections):
            connection.shutdown()
            if isinstance(connection, GatewayProtocol):
                connection.cancel()
        await self._until_closed()

    async def _until_idle(self, timeout_s: float) -> None:
        give_up = time.monotonic() + timeout_s
        while self._app.in_flight and time.monotonic() < give_up:  # noqa: ASYNC110  (an event would cost every request)
            await asyncio.sleep(0.02)

    async def _until_closed(self) -> None:
        give_up = time.monotonic() + _CLOSE_S
        while self._state.connections and time.monotonic() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        for connection in list(self._state.connections):
            if isinstance(connection, GatewayProtocol):
                connection.transport.abort()

    def _protocol(self) -> GatewayProtocol:
        max_header_bytes = self._settings.max_header_bytes
        return GatewayProtocol(self._config, self._state, self._outbox, max_header_bytes=max_header_bytes)

    def _set_date(self) -> None:
        line = b"date: %s\r\n" % formatdate(time.time(), usegmt=True).encode()
        self._state.default_headers = [(b"date", line)]
