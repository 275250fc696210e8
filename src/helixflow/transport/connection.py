"""One connection to an upstream, and the response that is being read from it."""

import asyncio
from typing import Final, Protocol, cast

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.transport.http_parser import ResponseError, ResponseParser
from helixflow.transport.pool import OriginPool

FOREVER: Final = float("inf")

_Failure = tuple[ErrorKind, str, BaseException | None]
_CLOSED: Final[_Failure] = (ErrorKind.CLIENT_CLOSED, "The request was closed before its answer was complete.", None)
_LOST: Final = "The model's server closed the connection before it answered."
_BROKEN: Final = "The model's server broke off its answer or sent one that is not valid HTTP."
_LATE: Final = "The model's server did not answer in time."
_OVERDUE: Final = "The request took longer than its time limit."


class ConnectionOwner(Protocol):
    """Who keeps connections; told of every change of one."""

    def made(self, connection: "Connection") -> None:
        """The socket is open. Called once, before anything else."""
        ...

    def released(self, connection: "Connection") -> None:
        """The response ended cleanly; the connection may carry another request."""
        ...

    def retired(self, connection: "Connection") -> None:
        """The connection will carry no more requests. Called once."""
        ...

    def lost(self, connection: "Connection") -> None:
        """The socket is closed. Called once, after `retired`."""
        ...


class HttpResponse:
    """A response whose head has arrived. One reader at a time.

    `headers` has lower-case names, the last of equal names wins; those before it are in `repeated`. When the body ends
    the connection goes back to its pool by itself; `close` before that aborts it.
    """

    __slots__ = (
        "_loop",
        "buffered",
        "connection",
        "deadline",
        "failure",
        "headers",
        "idle_s",
        "pieces",
        "repeated",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, idle_s: float, deadline: float) -> None:
        self._loop = loop
        self.idle_s = idle_s
        self.deadline = deadline
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.repeated: tuple[tuple[bytes, bytes], ...] = ()
        self.pieces: list[bytes] = []
        self.buffered = 0
        self.connection: Connection | None = None  # while the exchange is under way
        self.failure: _Failure | None = None

    async def read(self) -> bytes:
        """The next piece of the body as it came (everything at hand, joined), `b""` at its end.

        Raises `HelixError`: `UPSTREAM_INVALID` when the body breaks off, `DEADLINE` after `idle_s` of silence or past
        the request's deadline, `CLIENT_CLOSED` after `close`. A cancelled read aborts the connection.
        """
        while True:
            pieces = self.pieces
            connection = self.connection
            if pieces:
                data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                pieces.clear()
                if connection is not None:
                    self.buffered = 0
                    if connection.paused:
                        connection.resume()
                return data
            if connection is None:
                if self.failure is not None:
                    raise self.error()
                return b""
            loop = self._loop
            connection.waiter = waiter = loop.create_future()
            connection.deadline = min(loop.time() + self.idle_s, self.deadline)
            try:
                await waiter
            except BaseException:
                self.close()
                raise

    async def read_all(self, limit: int) -> bytes:
        """The whole rest of the body. Raises as `read` does, and `UPSTREAM_INVALID` past `limit` bytes (and closes)."""
        parts: list[bytes] = []
        size = 0
        while piece := await self.read():
            parts.append(piece)
            size += len(piece)
            if size > limit:
                self.close()
                raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent an answer that is too large.")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Ends the exchange; an unfinished one aborts the socket at once. Idempotent; never raises."""
        connection = self.connection
        if connection is not None:
            connection.fail(_CLOSED)

    def error(self) -> HelixError:
        """The failure as an exception: a fresh one each time, with its cause chained."""
        kind, message, cause = self.failure or _CLOSED
        error = HelixError(kind, message)
        error.__cause__ = cause
        return error


class Connection(asyncio.Protocol):
    """The protocol of one socket; carries one exchange at a time.

    `deadline` (event-loop clock) is when the current wait, or the whole exchange while nobody waits, fails; the owner
    compares it with the time now and then and calls `expire`. `expires_at` is when an idle connection is given up.
    """

    __slots__ = (
        "_max_buffer",
        "_owner",
        "_parser",
        "_silent",
        "_transport",
        "closed",
        "deadline",
        "expires_at",
        "paused",
        "pool",
        "response",
        "served",
        "waiter",
    )

    def __init__(self, owner: ConnectionOwner, pool: "OriginPool[Connection]", max_buffer: int) -> None:
        self._owner = owner
        self._max_buffer = max_buffer
        self._parser = ResponseParser()
        self._transport: asyncio.Transport | None = None
        self._silent = True
        self.pool = pool
        self.response: HttpResponse | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.deadline = FOREVER
        self.expires_at = FOREVER
        self.paused = False
        self.closed = False
        self.served = 0

    def begin(
        self, response: HttpResponse, payload: bytes, head_deadline: float, *, bodiless: bool
    ) -> "asyncio.Future[None]":
        """Sends a request; the future ends when `response` has a status or a failure."""
        transport = self._transport
        assert transport is not None
        parser = self._parser
        parser.start(bodiless=bodiless)
        response.pieces = parser.pieces
        response.connection = self
        self.response = response
        self.deadline = min(head_deadline, response.deadline)
        self._silent = True
        self.waiter = waiter = response._loop.create_future()
        transport.write(payload)
        return waiter

    def died_idle(self, response: HttpResponse) -> bool:
        """Whether `response` failed as on a connection that its server had given up meanwhile: used before, and ended
        without a byte of response. Such a request may be sent again.
        """
        failure = response.failure
        return self.served > 0 and failure is not None and failure[0] is ErrorKind.UPSTREAM_UNAVAILABLE

    @property
    def keep_alive(self) -> bytes | None:
        """The `Keep-Alive` header of the last response."""
        return self._parser.headers.get(b"keep-alive")

    def expire(self) -> None:
        """The deadline has passed."""
        response = self.response
        if response is not None:
            overdue = self.deadline >= response.deadline
            self.fail((ErrorKind.DEADLINE, _OVERDUE if overdue else _LATE, None))

    def resume(self) -> None:
        self.paused = False
        if self._transport is not None:
            self._transport.resume_reading()

    def fail(self, failure: _Failure) -> None:
        """Ends the exchange with `failure` and aborts the socket."""
        response = self.response
        if response is not None:
            self.response = None
            response.failure = failure
            response.connection = None
            self._wake()
        self.abort()

    def abort(self) -> None:
        """Closes the socket at once, unsent data is dropped. Idempotent."""
        self._retire()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        if self.closed:  # given up while it was being made
            self._transport.abort()
            return
        self._owner.made(self)

    def data_received(self, data: bytes) -> None:
        response = self.response
        if response is None:
            self.abort()  # nobody asked: whatever it is, it must not be taken for the next answer
            return
        self._silent = False
        parser = self._parser
        try:
            parser.feed(data)
        except ResponseError as exc:
            self.fail((ErrorKind.UPSTREAM_INVALID, _BROKEN, exc))
            return
        if not parser.head_complete:
            return
        if response.status == 0:
            response.headers = parser.headers
            response.repeated = parser.repeated
            response.status = parser.status
        if parser.complete:
            self._finish(response)
            return
        response.buffered += len(data)
        if response.buffered > self._max_buffer and not self.paused:
            self.paused = True
            assert self._transport is not None
            self._transport.pause_reading()
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            self.deadline = response.deadline
            if not waiter.done():
                waiter.set_result(None)

    def eof_received(self) -> None:
        self._end(None)  # returning None lets the transport close itself

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)
        self._transport = None
        self._parser.release()
        self._owner.lost(self)

    def _end(self, exc: Exception | None) -> None:
        """The peer sends no more."""
        self._retire()
        response = self.response
        if response is None:
            return
        if self._silent:
            self.fail((ErrorKind.UPSTREAM_UNAVAILABLE, _LOST, exc))
            return
        try:
            if exc is not None:
                raise ResponseError("the connection was reset") from exc
            self._parser.finish()
        except ResponseError as error:
            self.fail((ErrorKind.UPSTREAM_INVALID, _BROKEN, error))
            return
        self._finish(response)

    def _finish(self, response: HttpResponse) -> None:
        """The response is complete: what is unread of it stays with it, the connection is free."""
        self.response = None
        response.connection = None
        transport = self._transport
        if self.paused:
            self.resume()
        # A server that answered before it read the whole request may never read the rest.
        if self._parser.reusable and not self.closed and transport and transport.get_write_buffer_size() == 0:
            self.served += 1
            self._owner.released(self)
        else:
            self.abort()
        self._wake()

    def _wake(self) -> None:
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def _retire(self) -> None:
        if not self.closed:
            self.closed = True
            self._owner.retired(self)
