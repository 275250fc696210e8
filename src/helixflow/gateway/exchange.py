"""One HTTP request and its response, over ASGI."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from random import getrandbits
from typing import Any

from helixflow.core.call import Operation, Principal, Progress

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_SANE_ID = re.compile(rb"[A-Za-z0-9._:/=+-]{1,128}")
JSON = (b"content-type", b"application/json")
CLOSE = (b"connection", b"close")


class ClientGone(Exception):
    """The client left before its answer was complete."""


class Exchange:
    """What is known of a request while it is served. Header names are lower-case bytes, the last of a name wins."""

    # What most requests leave as it is stands on the class: cheaper than setting it for each.
    principal: Principal | None = None
    operation: Operation | None = None
    model: str | None = None
    stream: bool | None = None
    progress: Progress | None = None
    status: int = 0
    error: str | None = None
    response_started = False
    disconnected = False

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.started = time.perf_counter()
        self.scope = scope
        self.receive = receive
        self.send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self.call_id = f"{getrandbits(128):032x}"
        own_id = self.headers.get(b"x-request-id")
        if own_id is not None and _SANE_ID.fullmatch(own_id):
            self.request_id = own_id.decode("ascii")
        else:
            self.request_id = "req_" + self.call_id
        self._task = asyncio.current_task()
        scope["helixflow.on_disconnect"] = self._on_disconnect

    def _on_disconnect(self) -> None:
        """Called by the protocol when the socket is gone: ends the work at once, wherever it waits."""
        self.disconnected = True
        if self._task is not None:
            self._task.cancel()

    def uncancel(self) -> None:
        """Takes back the cancellation that a disconnect caused, once it has been dealt with."""
        if self._task is not None:
            self._task.uncancel()

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends the head."""
        self.response_started = True
        self.status = status
        headers.append((b"x-request-id", self.request_id.encode()))
        headers += self.extra_headers
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def finish(self, body: bytes = b"") -> None:
        """Sends the last piece of the body."""
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def reply(
        self,
        status: int,
        body: bytes,
        headers: list[tuple[bytes, bytes]] | None = None,
        content: tuple[bytes, bytes] = JSON,
    ) -> None:
        """Sends a whole response."""
        await self.start(status, [content, (b"content-length", b"%d" % len(body)), *(headers or ())])
        await self.finish(body)
