"""One HTTP request and its response, over ASGI."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from random import getrandbits
from typing import Any

from helixflow.core.call import Operation, Progress
from helixflow.core.principal import Principal
from helixflow.gateway.cycle import Cycle

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
    extra_headers: tuple[tuple[bytes, bytes], ...] = ()
    _gone = False

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.started = time.perf_counter()
        self.scope = scope
        self.receive = receive
        self.send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        # In the order of time, for the ledger's index: 48 bits of milliseconds, then random ones.
        self.call_id = (time.time_ns() // 1_000_000 << 80 | getrandbits(80)).to_bytes(16).hex()
        self._cycle: Cycle | None = scope.get("helixflow.cycle")
        # What the requests of one connection remember for the next one.
        self.connection: dict[str, Any] = scope.get("helixflow.connection", {})
        own_id = self.headers.get(b"x-request-id")
        if own_id is not None and _SANE_ID.fullmatch(own_id):
            self.request_id = own_id.decode("ascii")
        else:
            self.request_id = "req_" + self.call_id

    @property
    def disconnected(self) -> bool:
        """The client has left. Where the server is ours, its task is cancelled at that moment."""
        return self._gone or (self._cycle is not None and self._cycle.disconnected)

    def abandon(self) -> None:
        """The client was found to have left; where a cancellation told of it, that has been dealt with."""
        self._gone = True
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            task.uncancel()

    def take_body(self) -> bytes | None:
        """The whole body if it has come in already; None: `receive` it."""
        return self._cycle.take_body() if self._cycle is not None else None

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

    def respond(self, fields: bytes, body: bytes) -> bool:
        """Sends a whole response with status 200 in one write; False if that cannot be: `reply` then.

        `fields` are all header lines but the length's, each with its line end, of values known to be safe.
        """
        cycle = self._cycle
        if cycle is None or self.extra_headers:
            return False
        if not cycle.respond(200, fields, body):
            return False
        self.response_started = True
        self.status = 200
        return True

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
