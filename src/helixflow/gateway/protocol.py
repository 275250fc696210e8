"""uvicorn's HTTP protocol with what a public port needs: bounded heads, deadlines for slow senders and readers, the
end of a connection told to the request at once, errors in the API's own form. Hot path: a request costs no timer.
"""

import asyncio
import os
import re
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_errors import render_error
from helixflow.gateway.cycle import Cycle

MAX_DISCARDED_BYTES = 32 * 2**20
_UPGRADE = re.compile(rb"(?im)^upgrade:")
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class GatewayProtocol(HttpToolsProtocol):
    """One client connection. `max_header_bytes` bounds its request heads."""

    def __init__(self, config: Config, state: ServerState, *, max_header_bytes: int) -> None:
        super().__init__(config, state, {})
        self._max_header_bytes = max_header_bytes
        self._head_bytes = 0
        self._head_received = 0
        self._discarded = 0
        self._running: Cycle | None = None
        self._task: asyncio.Task[None] | None = None
        self._refused = False
        # Times on the event loop's clock; None while that is not what the connection does.
        self._idle_since: float | None = None
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._stalled_since: float | None = None

    # The transport's side

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        running = self._running
        super().connection_lost(exc)
        self.pipeline.clear()
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
            on_disconnect = running.scope.get("helixflow.on_disconnect")
            if on_disconnect is not None:
                on_disconnect()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._idle_since = None
        headers = self.headers
        if b"pgrade" in data and self._body_since is None:
            data = _without_upgrade(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # it came in pieces and so past `_without_upgrade`; the request itself has been parsed
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._head_since is not None and self.headers is headers:
            # The parser tells of a header once it is complete: one without end must not fill the memory.
            self._head_received += len(data)
            if self._head_received > self._max_header_bytes and not self._refused:
                self._head_bytes += self._head_received
                self.send_400_response("")

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
        self._count_head(len(url))
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._body_since, self._head_since = self._head_since, None
        self._discarded = 0
        path, query = _split_target(self.url)
        version = self.parser.get_http_version()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": self.parser.get_method().decode("ascii"),
            "root_path": "",
            "path": path,
            "raw_path": self.url,
            "query_string": query,
            "headers": self.headers,
        }
        cycle = Cycle(
            scope,
            self.transport,
            self.flow,
            self.server_state.default_headers[0][1],
            expect_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self.cycle = cast(RequestResponseCycle, cycle)
        if self._running is None or self._running.response_complete:
            self._start(cycle)
        else:
            # A pipelined request waits for the answers before it.
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            # The rest of a refused body is read and dropped, so that the connection stays usable; not without end.
            self._discarded += len(body)
            if self._discarded > MAX_DISCARDED_BYTES:
                self.transport.close()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._body_since = None
        super().on_message_complete()
        cycle = self.cycle
        if cycle.response_complete:
            cycle.more_body = False
            if not cycle.keep_alive:
                self.transport.close()

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, _ = self.pipeline.pop()
            self._start(cast(Cycle, cycle))
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

    def cancel(self) -> None:
        """Ends the request that runs, if one does."""
        if self._task is not None:
            self._task.cancel()

    def _start(self, cycle: Cycle) -> None:
        self._running = cycle
        self._task = self.loop.create_task(cycle.run(self.app))

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._max_header_bytes:
            raise ValueError("the request head is too large")

    def _refuse(self, status: int, error: HelixError) -> None:
        body = render_error(error)
        head = (
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: req_%s\r\n"
            b"connection: close\r\n\r\n"
        ) % (status, _REASONS[status], len(body), os.urandom(16).hex().encode())
        self.transport.write(head + body)
        self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """A head without the offer to upgrade, which may be ignored (RFC 9110, section 7.8): Java's client makes one on
    each plain connection, and the parser would give up the body.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"x-upgrade:", head) + end + rest


def _split_target(target: bytes) -> tuple[str, bytes]:
    """Path (decoded) and query of a request target. Raises `httptools.HttpParserInvalidURLError` for nonsense."""
    if target.startswith(b"/") and b"?" not in target and b"#" not in target:
        path, query = target.decode("ascii"), b""
    else:
        url = httptools.parse_url(target)
        path, query = (url.path or b"/").decode("ascii"), url.query or b""
    return (unquote(path) if "%" in path else path), query
