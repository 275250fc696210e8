"""Around every request: its id, the headers of every answer, a bound on how many run, and what no one expected."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from secrets import token_hex
from typing import Any, Final

import structlog
from starlette.requests import ClientDisconnect

from helixflow.console.problems import render
from helixflow.core.errors import ErrorKind, HelixError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_IN_FLIGHT: Final = 256
_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._:/=+-]{1,128}")
_HEADERS: Final = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]

log = structlog.get_logger("helixflow.console")


class Envelope:
    """ASGI middleware. Over `max_in_flight` requests at once are refused as OVERLOADED."""

    def __init__(self, app: Application, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._app = app
        self._max_in_flight = max_in_flight
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["helixflow.request_id"] = _request_id(scope)
        started = False

        async def send_enveloped(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = [*_HEADERS, (b"x-request-id", request_id.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        if self._in_flight >= self._max_in_flight:
            error = HelixError(ErrorKind.OVERLOADED, "Too many administrative requests run now.", retry_after_s=1)
            await render(error, scope)(scope, receive, send_enveloped)
            return
        self._in_flight += 1
        try:
            await self._app(scope, receive, send_enveloped)
        except ClientDisconnect:
            log.debug("admin_request.abandoned", request_id=request_id)
        except Exception as exc:
            log.error("admin_request.failed", request_id=request_id, exc_info=exc)
            if started:
                # The server cuts the connection off, so that the client sees an answer that did not end.
                return
            message = f"The server failed to process the request. Its administrator can look up {request_id}."
            await render(HelixError(ErrorKind.INTERNAL, message), scope)(scope, receive, send_enveloped)
        finally:
            self._in_flight -= 1


def _request_id(scope: Scope) -> str:
    """The gateway's, or one of our own."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return f"req_{token_hex(16)}"
