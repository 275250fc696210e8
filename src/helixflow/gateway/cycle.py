"""One request and its response on a connection: the ASGI side of `protocol`.

Does what uvicorn's own cycle does for HTTP/1.1, at a third of its cost: head and first piece leave in one write, and
header values, which all come from this package, are checked once for the whole head.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from uvicorn.protocols.http.flow_control import FlowControl

from helixflow.core.errors import ErrorKind, HelixError

Message = MutableMapping[str, Any]

_STATUS_LINE: Final = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_BODILESS: Final = frozenset({204, 304})

log = structlog.get_logger("helixflow.gateway")


class Cycle:
    """`on_response` is called once, when the last byte of the response has been handed to the transport."""

    __slots__ = (
        "_bodiless",
        "_default_headers",
        "_delivered",
        "_expired",
        "_head",
        "_left",
        "_on_response",
        "_waiting_for_continue",
        "body",
        "chunked",
        "disconnected",
        "flow",
        "keep_alive",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
        "scope",
        "transport",
    )

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        transport: asyncio.Transport,
        flow: FlowControl,
        default_headers: bytes,
        *,
        expect_continue: bool,
        keep_alive: bool,
        on_response: Callable[[], None],
    ) -> None:
        self.scope = scope
        self.transport = transport
        self.flow = flow
        self._default_headers = default_headers
        self._on_response = on_response
        self._waiting_for_continue = expect_continue
        self.keep_alive = keep_alive
        self.disconnected = False
        self.message_event = asyncio.Event()
        self.body = bytearray()
        self.more_body = True
        self.response_started = False
        self.response_complete = False
        self.chunked = False
        self._bodiless = False
        self._delivered = False
        self._expired = False
        self._head = b""
        self._left = 0

    async def run(self, app: Callable[..., Any]) -> None:
        """Runs the app; whatever it leaves unfinished ends the connection."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as exc:  # the app answers its own errors; this is for faults in doing so
            log.error("request.crashed", exc_info=exc)
        finally:
            if not self.response_complete and not self.disconnected:
                self.transport.abort()

    def expire(self) -> None:
        """The body has not arrived in time: `receive` raises."""
        self._expired = True
        self.message_event.set()

    async def receive(self) -> Message:
        """The ASGI `receive`: the body as it has come in so far, or the client's leaving.

        Raises `HelixError` REQUEST_TIMEOUT when the rest of the body has not come in time.
        """
        if self._waiting_for_continue and not self.transport.is_closing():
            self.transport.write(_CONTINUE)
            self._waiting_for_continue = False
        while not (self.disconnected or self.response_complete):
            if self.body or not (self.more_body or self._delivered):
                self._delivered = not self.more_body
                body = bytes(self.body)
                self.body.clear()
                return {"type": "http.request", "body": body, "more_body": self.more_body}
            if self._expired:
                raise HelixError(ErrorKind.REQUEST_TIMEOUT, "The request body did not arrive in time.")
            self.flow.resume_reading()
            self.message_event.clear()
            await self.message_event.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """The ASGI `send`. The head is held until the first piece of the body. Waits while the client does not read."""
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
            return
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        body: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        if self._bodiless:
            body = b""
        elif self.chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        else:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the response's body does not have its content-length")
        if self._head:
            body, self._head = self._head + body, b""
        if body:
            self.transport.write(body)
        if not more:
            self.response_complete = True
            self.message_event.set()
            # While the body is still coming in, closing would reset the connection under the answer.
            if not self.keep_alive and not self.more_body:
                self.transport.close()
            self._on_response()

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        self._waiting_for_continue = False
        length = None
        lines = [_STATUS_LINE[status], self._default_headers]
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"connection" and value == b"close":
                self.keep_alive = False
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self.scope["method"] == "HEAD" or status in _BODILESS:
            self._bodiless = True
        elif length is None:
            self.chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            self._left = length
        lines.append(b"\r\n")
        head = b"".join(lines)
        # One line feed a line (the default headers are two lines at most): none came in with a value.
        if head.count(b"\n") != len(lines) - 1 + self._default_headers.count(b"\n"):
            raise RuntimeError("a response header has a line break in it")
        self._head = head
