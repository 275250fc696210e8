"""Serves the admin API on a Unix socket that only its owner can reach, within the present event loop."""

import asyncio
import socket
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from helixflow.core.errors import ExitCode, UserError
from helixflow.rpc.sockets import clear_stale_socket

SOCKET_NAME: Final = "admin"
_BACKLOG: Final = 512
_MAX_HEAD_BYTES: Final = 64 * 1024
# Longer than our gateways keep a connection: they close it first.
_KEEP_ALIVE_S: Final = 75
_GRACE_S: Final = 5.0
_CLOSE_S: Final = 2.0
_TICK_S: Final = 0.02


class AdminServer:
    """uvicorn's protocol without its server: signals and the order of shutting down are `launch`'s business."""

    def __init__(self, app: FastAPI, path: Path) -> None:
        self._path = path
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self._config = uvicorn.Config(
            app,
            interface="asgi3",
            http=H11Protocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        )

    async def start(self) -> None:
        """Requests are answered from here on. Raises `UserError` when the socket cannot be had."""
        await asyncio.to_thread(self._config.load)
        listener = await asyncio.to_thread(self._bind)
        self._server = await asyncio.get_running_loop().create_unix_server(
            self._protocol, sock=listener, backlog=_BACKLOG
        )

    async def close(self) -> None:
        """Lets running requests end for a moment, then cuts them off. Idempotent."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        # A connection that was just accepted shows up on the loop's next turns.
        await asyncio.sleep(_TICK_S)
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._until_empty(self._state.tasks, _GRACE_S)
        for task in list(self._state.tasks):
            task.cancel()
        await self._until_empty(self._state.tasks, _CLOSE_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await self._until_empty(self._state.connections, _CLOSE_S)
        await asyncio.to_thread(self._path.unlink, missing_ok=True)

    async def _until_empty(self, found: Collection[object], timeout_s: float) -> None:
        give_up = time.monotonic() + timeout_s
        while found and time.monotonic() < give_up:  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(_TICK_S)

    def _protocol(self) -> H11Protocol:
        return H11Protocol(self._config, self._state, {})

    def _bind(self) -> socket.socket:
        """A socket at the path, mode 0600 before anybody can connect: it does not listen yet."""
        clear_stale_socket(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
        except OSError as exc:
            listener.close()
            raise UserError(f"{self._path}: cannot listen: {exc.strerror}", ExitCode.STORAGE) from exc
        listener.setblocking(False)
        return listener
