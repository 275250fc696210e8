"""One request and its response on a connection: the ASGI side of `protocol`.

Does what uvicorn's own cycle does for HTTP/1.1, at a third of its cost: head and first piece leave in one write, and
header values, which all come from this package, are checked once for the whole head. `take_body` and `respond` are
shortcuts past ASGI for what most requests are: a body that came with its head, an answer that is at hand as a whole.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.http.flow_control import FlowControl

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.gateway.outbox import Outbox

Message = MutableMapping[str, Any]

_STATUS_LINE: Final = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_BODILESS: Final = frozenset({204, 304})


class Cycle:
    """`on_response` is called once, when the last byte of the response has been handed to the transport."""

    # What most requests leave as it is stands on the class: cheaper than setting it for each.
    body = b""
    more_body = True
    chunked = False
    disconnected = False
    response_started = False
    response_complete = False
    _bodiless = False
    _delivered = False
    _expired = False
    _head = b""
    _left = 0
    waiter: asyncio.Future[None] | None = None

    def __init__(
        self,
        method: str,
        transport: asyncio.Transport,
        flow: FlowControl,
        outbox: Outbox,
        default_headers: bytes,
        on_response: Callable[[], None],
        *,
        expect_continue: bool,
        keep_alive: bool,
    ) -> None:
        self.transport = transport
        self.flow = flow
        self.keep_alive = keep_alive
        self._method = method
        self._outbox = outbox
        self._default_headers = default_headers
        self._on_response = on_response
        self._waiting_for_continue = expect_continue

    def wake(self) -> None:
        """Something has changed that `receive` may wait for."""
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def expire(self) -> None:
        """The body has not arrived in time: `receive` raises."""
        self._expired = True
        self.wake()

    def take_body(self) -> bytes | None:
        """The whole body if all of it is at hand and none has been received yet, otherwise None."""
        if self.more_body or self._delivered or self.disconnected:
            return None
        self._delivered = True
        body, self.body = self.body, b""
        return body

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
                body, self.body = self.body, b""
                return {"type": "http.request", "body": body, "more_body": self.more_body}
            if self._expired:
                raise HelixError(ErrorKind.REQUEST_TIMEOUT, "The request body did not arrive in time.")
            self.flow.resume_reading()
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
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
            self._complete()

    def respond(self, status: int, fields: bytes, body: bytes) -> bool:
        """A whole response in one write, without waiting: False, and nothing done, while the client does not read.

        `fields` are header lines, each with its line end, without `content-length` and `connection`. Not for answers
        to HEAD or for statuses without a body.
        """
        if self.flow.write_paused or self.disconnected or self.response_started:
            return False
        self.response_started = True
        self._waiting_for_continue = False
        closing = b"" if self.keep_alive else b"connection: close\r\n"
        response = b"%b%b%bcontent-length: %d\r\n%b\r\n%b" % (
            _STATUS_LINE[status],
            self._default_headers,
            fields,
            len(body),
            closing,
            body,
        )
        if self.keep_alive:
            self._outbox.write(self.transport, response)
        else:
            self.transport.write(response)
        self._complete()
        return True

    def _complete(self) -> None:
        self.response_complete = True
        if self.waiter is not None:
            self.wake()
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
        if self._method == "HEAD" or status in _BODILESS:
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
