"""uvicorn's HTTP protocol with what a public port needs: bounded heads, deadlines for slow senders and readers, the
end of a connection told to the request at once, errors in the API's own form.
"""

import os
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_errors import render_error

MAX_DISCARDED_BYTES = 1024 * 1024


class GatewayProtocol(HttpToolsProtocol):
    """One client connection. `max_header_bytes` bounds its request heads."""

    def __init__(self, config: Config, state: ServerState, *, max_header_bytes: int) -> None:
        super().__init__(config, state, {})
        self._max_header_bytes = max_header_bytes
        self._head_bytes = 0
        self._discarded = 0
        self._running: RequestResponseCycle | None = None
        self._refused = False
        self.head_since: float | None = None
        self.stalled_since: float | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.head_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        running = self._running
        super().connection_lost(exc)
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
            on_disconnect = cast(dict[str, Any], running.scope).get("helixflow.on_disconnect")
            if on_disconnect is not None:
                on_disconnect()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head_since = self.loop.time()
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.head_since = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            # The rest of a refused body is read and dropped, so that the connection stays usable; not without end.
            self._discarded += len(body)
            if self._discarded > MAX_DISCARDED_BYTES:
                self.transport.close()
            return
        super().on_body(body)

    def pause_writing(self) -> None:
        self.stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.stalled_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this for what is not HTTP; nothing that follows on this connection can be trusted."""
        self._refused = True
        if self._running is not None and not self._running.response_complete:
            self.transport.abort()
            return
        if self._head_bytes > self._max_header_bytes:
            message = f"The request's line and headers are larger than the limit of {self._max_header_bytes} bytes."
            self._refuse(431, HelixError(ErrorKind.BODY_TOO_LARGE, message))
        else:
            self._refuse(400, HelixError(ErrorKind.INVALID_REQUEST, "This is not a valid HTTP/1.1 request."))

    def cut_off(self, now: float, *, header_timeout_s: float, stall_timeout_s: float) -> None:
        """Ends the connection if its client has been too slow at `now` (event-loop clock, seconds)."""
        if self.stalled_since is not None and now - self.stalled_since > stall_timeout_s:
            self.transport.abort()
        elif self.head_since is not None and now - self.head_since > header_timeout_s:
            self.head_since = None
            if self._head_bytes:
                self._refused = True
                self._refuse(408, HelixError(ErrorKind.REQUEST_TIMEOUT, "The request's head did not arrive in time."))
            else:
                self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._max_header_bytes:
            raise ValueError("the request head is too large")

    def _refuse(self, status: int, error: HelixError) -> None:
        body = render_error(error)
        reason = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}[status]
        head = (
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: req_%s\r\n"
            b"connection: close\r\n\r\n"
        ) % (status, reason, len(body), _random_id())
        self.transport.write(head + body)
        self.transport.close()


def _random_id() -> bytes:
    return os.urandom(16).hex().encode()
