"""uvicorn's HTTP protocol with what a public port needs: bounded heads, deadlines for slow senders and readers, the
end of a connection told to the request at once, errors in the API's own form. Hot path: a request costs no timer.
"""

import asyncio
import os
from collections import deque
from collections.abc import MutableMapping
from typing import Any, Final

import httptools
import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_errors import render_error
from helixflow.gateway.cycle import Cycle
from helixflow.gateway.head import split_target, without_upgrade
from helixflow.gateway.outbox import Outbox

Scope = MutableMapping[str, Any]

MAX_DISCARDED_BYTES = 32 * 2**20
# An idle TLS client that leaves our farewell unanswered for so long gets no longer one.
_LINGER_S: Final = 2.0
# Pipelined requests that are read ahead.
_MOST_WAITING: Final = 16
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}

log = structlog.get_logger("helixflow.gateway")


class GatewayProtocol(HttpToolsProtocol):
    """One client connection. `max_header_bytes` bounds its request heads."""

    def __init__(self, config: Config, state: ServerState, outbox: Outbox, *, max_header_bytes: int) -> None:
        super().__init__(config, state, {})
        self._outbox = outbox
        self._max_header_bytes = max_header_bytes
        self._head_bytes = 0
        self._head_received = 0
        # Of the body after the last head in the piece of data that is being read.
        self._piece_body_bytes = 0
        self._discarded = 0
        self._receiving: Cycle | None = None
        self._running: Cycle | None = None
        self._waiting: deque[tuple[Cycle, Scope]] = deque()
        self._next: Scope | None = None
        self._task: asyncio.Task[None] | None = None
        self._turn: asyncio.Future[None] | None = None
        # What requests remember for the next one on this connection.
        self._memory: dict[str, Any] = {}
        self._target, self._path, self._query = b"", "", b""
        self._refused = False
        self._lost = False
        # Times on the event loop's clock; None while that is not what the connection does.
        self._idle_since: float | None = None
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._stalled_since: float | None = None

    # The transport's side

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_since = self.loop.time()
        if self.scheme == "https":
            # Its default is eight times that of a plain connection: that much less would be known of a slow reader.
            transport.set_write_buffer_limits(high=HIGH_WATER_LIMIT)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        self._waiting.clear()
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()
        self.parser = None  # type: ignore[assignment]  # it and this object refer to each other
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.wake()
        self._lost = True
        # Ends the work at once, wherever it waits; what only finishes an answered request comes to its end.
        if self._task is not None and (self._turn is not None or (running and not running.response_complete)):
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._idle_since = None
        headers = self.headers
        self._piece_body_bytes = 0
        if b"pgrade" in data and self._body_since is None:
            data = without_upgrade(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # it came in pieces and so past `without_upgrade`; the request itself has been parsed
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._head_since is not None and not self._refused:
            # The parser tells of a header once it is complete: one without end must not fill the memory.
            self._head_received += len(data) if self.headers is headers else self._count_begun_head(data)
            if self._head_received > self._max_header_bytes:
                self._head_bytes += self._head_received
                self.send_400_response("")

    def _count_begun_head(self, data: bytes) -> int:
        """How much of `data` is of the unfinished head that begins in it: all after the last empty line, which ends a
        head, but for a body in between. Never too much, so that pipelined requests are safe; too little where that
        body holds empty lines itself.
        """
        end = max(data.rfind(b"\n\r\n") + 3, data.rfind(b"\n\n") + 2)
        begun = len(data) - end if end > 2 else len(data)
        return max(0, begun - self._piece_body_bytes)

    def pause_writing(self) -> None:
        self._stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = None
        super().resume_writing()

    # The parser's side

    def on_message_begin(self) -> None:
        self._head_since = self.loop.time()
        self._head_bytes = self._head_received = 0
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > self._max_header_bytes:
            raise ValueError("the request target is too large")
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._max_header_bytes:
            raise ValueError("the request head is too large")
        if self._head_since is None:
            # A trailer, which may come from somebody whom a proxy in front did not look at (RFC 9110, section 6.5.1).
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._body_since, self._head_since = self._head_since, None
        self._discarded = self._piece_body_bytes = 0
        version = self.parser.get_http_version()
        method = self.parser.get_method().decode("ascii")
        if self.url != self._target:
            self._path, self._query = split_target(self.url)
            self._target = self.url
        cycle = self._receiving = Cycle(
            method,
            self.transport,
            self.flow,
            self._outbox,
            self.server_state.default_headers[0][1],
            self.on_response_complete,
            expect_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
        )
        scope = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": method,
            "root_path": "",
            "path": self._path,
            "raw_path": self.url,
            "query_string": self._query,
            "headers": self.headers,
            "helixflow.cycle": cycle,
            "helixflow.connection": self._memory,
        }
        if self._running is None or self._running.response_complete:
            self._start(cycle, scope)
        else:
            # A pipelined request waits for the answers before it. Only behind many is nothing more read: who does not
            # read does not see the client leave.
            self._waiting.append((cycle, scope))
            if len(self._waiting) >= _MOST_WAITING:
                self.flow.pause_reading()

    def on_body(self, body: bytes) -> None:
        cycle = self._receiving
        assert cycle is not None
        self._piece_body_bytes += len(body)
        if cycle.response_complete:
            # The rest of a refused body is read and dropped, so that the connection stays usable; not without end.
            self._discarded += len(body)
            if self._discarded > MAX_DISCARDED_BYTES:
                self.transport.close()
            return
        cycle.body = cycle.body + body if cycle.body else body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        if cycle.waiter is not None:
            cycle.wake()

    def on_message_complete(self) -> None:
        self._body_since = None
        cycle = self._receiving
        assert cycle is not None
        cycle.more_body = False
        if cycle.waiter is not None:
            cycle.wake()
        if cycle.response_complete and not cycle.keep_alive:
            self.transport.close()

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self._waiting:
            self._outbox.flush()
            self._start(*self._waiting.popleft())
        else:
            self._idle_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Called for what is not HTTP; nothing that follows on this connection can be trusted."""
        self._refused = True
        if self._running is not None and not self._running.response_complete:
            self.transport.abort()
        elif self._head_bytes > self._max_header_bytes:
            message = f"The request's line and headers are larger than the limit of {self._max_header_bytes} bytes."
            self._refuse(431, HelixError(ErrorKind.BODY_TOO_LARGE, message))
        else:
            self._refuse(400, HelixError(ErrorKind.INVALID_REQUEST, "This is not a valid HTTP/1.1 request."))

    # The server's side

    def cut_off(
        self, now: float, *, header_timeout_s: float, body_timeout_s: float, stall_timeout_s: float, keep_alive_s: float
    ) -> None:
        """Ends the connection if its client has been too slow, or idle for too long, at `now`."""
        if self._stalled_since is not None and now - self._stalled_since > stall_timeout_s:
            self.transport.abort()
        elif self._idle_since is not None and now - self._idle_since > keep_alive_s:
            if now - self._idle_since > keep_alive_s + _LINGER_S:
                self.transport.abort()
            else:
                self.transport.close()
        elif self._body_since is not None and now - self._body_since > body_timeout_s:
            self._expire_body()
        elif self._head_since is not None and now - self._head_since > header_timeout_s:
            self._head_since = None
            if self._head_bytes:
                self._refused = True
                self._refuse(408, HelixError(ErrorKind.REQUEST_TIMEOUT, "The request's head did not arrive in time."))
            else:
                self.transport.close()

    def _expire_body(self) -> None:
        running = self._running
        if running is None or running.response_complete:
            self.transport.close()
        elif running.more_body:
            self._body_since = None
            running.expire()

    def shutdown(self) -> None:
        """Ends the connection once the requests that have come in are answered."""
        if self._receiving is None or self._receiving.response_complete:
            self.transport.close()
        else:
            self._receiving.keep_alive = False

    def cancel(self) -> None:
        """Ends the request that runs, if one does."""
        if self._task is not None:
            self._task.cancel()

    def _start(self, cycle: Cycle, scope: Scope) -> None:
        """Has the connection's task answer a request; if it still finishes the one before, right after that."""
        self._running = cycle
        self._next = scope
        if self._task is None:
            self._task = self.loop.create_task(self._serve())
        elif self._turn is not None and not self._turn.done():
            self._turn.set_result(None)
            self._turn = None

    async def _serve(self) -> None:
        """Answers requests, one after the other, until cancelled with the end of the connection: one task for all of
        them, since a task of its own costs each request 4 µs.
        """
        while not self._lost:
            if self._next is None:
                self._turn = self.loop.create_future()
                await self._turn
            scope, self._next = self._next, None
            cycle = self._running
            assert cycle is not None and scope is not None
            try:
                await self.app(scope, cycle.receive, cycle.send)
            except Exception as exc:  # the app answers its own errors; this is for faults in doing so
                log.error("request.crashed", exc_info=exc)
            finally:
                # What the app leaves unfinished ends the connection.
                if not cycle.response_complete and not cycle.disconnected:
                    self.transport.abort()

    def _refuse(self, status: int, error: HelixError) -> None:
        body = render_error(error)
        head = (
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: req_%s\r\n"
            b"connection: close\r\n\r\n"
        ) % (status, _REASONS[status], len(body), os.urandom(16).hex().encode())
        self._outbox.flush()
        self.transport.write(head + body)
        self.transport.close()
