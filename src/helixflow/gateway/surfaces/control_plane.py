"""The reverse proxy in front of the admin API, over the control process's Unix socket: everything under /api/v1, and
OpenAI's endpoints for an organisation.
"""

import asyncio
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Final

import httptools

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.gateway.body import read_whole
from helixflow.gateway.client_address import Address, ClientAddresses
from helixflow.gateway.exchange import Exchange
from helixflow.gateway.sign_in_rate import SignInRate
from helixflow.transport.client import HttpClient, HttpResponse, Timeouts, build_head
from helixflow.transport.origin import Origin

PREFIX: Final = "/api/v1"
ORGANISATION: Final = "/v1/organization/"
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MAX_BODY_BYTES: Final = 2**20
# An answer there begins within the deadline of its RPC, 30 s at most; after that the process hangs.
_TIMEOUTS: Final = Timeouts(connect_s=2, first_byte_s=38, idle_s=60)
_STATUSES: Final = frozenset(status.value for status in HTTPStatus)

Header = tuple[bytes, bytes]

# About one connection only (RFC 9110, section 7.6.1).
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-upgrade",  # what `without_upgrade` makes of it
    }
)
# The gateway's to say; `expect` and the length are settled once the body has been read.
_OURS: Final = frozenset({b"forwarded", b"x-real-ip", b"x-request-id", b"expect", b"content-length"})
_OUR_PREFIXES: Final = (b"x-forwarded-", b"x-helixflow-")
_NOT_PASSED_BACK: Final = frozenset({b"date", b"server", b"x-request-id"})


def is_control_plane(path: str) -> bool:
    """Whether requests there are the control process's."""
    return path.startswith(ORGANISATION) or has_problems(path)


def has_problems(path: str) -> bool:
    """Whether errors there are problem documents."""
    return path.startswith(PREFIX) and path[len(PREFIX) : len(PREFIX) + 1] in ("", "/")


class ControlPlaneSurface:
    """Passes requests on and answers back; a client that leaves ends its request there too."""

    def __init__(
        self,
        client: HttpClient,
        socket: Path,
        addresses: ClientAddresses,
        sign_ins: SignInRate,
        *,
        timeout_s: float,
    ) -> None:
        self._client = client
        self._sign_ins = sign_ins
        self._origin = Origin.unix(socket)
        self._addresses = addresses
        self._timeout_s = timeout_s

    async def forward(self, exchange: Exchange) -> None:
        """Raises `HelixError`: INVALID_REQUEST, METHOD_NOT_ALLOWED, TOO_MANY_ATTEMPTS, BODY_TOO_LARGE, UNAVAILABLE when
        the control process is away, UPSTREAM_INVALID, DEADLINE; after the head as well.
        """
        if exchange.method not in METHODS:
            allowed = ", ".join(METHODS)
            exchange.extra_headers += ((b"allow", allowed.encode()),)
            raise HelixError(ErrorKind.METHOD_NOT_ALLOWED, f"{exchange.method} is not allowed here; use {allowed}.")
        address = self._addresses.find(exchange)
        self._sign_ins.check(exchange, address)
        head = self._build_head(exchange, address)
        body = await read_whole(exchange, max_bytes=MAX_BODY_BYTES)
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            response = await self._client.request(self._origin, head, body, timeouts=_TIMEOUTS, deadline=deadline)
            try:
                await _pass_back(exchange, response)
            finally:
                response.close()
        except HelixError as exc:
            raise _as_ours(exc) from exc

    def _build_head(self, exchange: Exchange, address: Address | None) -> bytes:
        headers = [*_end_to_end(exchange.scope["headers"])]
        headers = [header for header in headers if not _is_ours(header[0])]
        if address is not None:
            headers.append((b"x-forwarded-for", str(address).encode()))
        headers.append((b"x-forwarded-proto", exchange.scope["scheme"].encode()))
        headers.append((b"x-request-id", exchange.request_id.encode()))
        try:
            target = _target_of(exchange.scope["raw_path"])
            texts = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
            return build_head(exchange.method, target, self._origin, texts)
        except (ValueError, httptools.HttpParserInvalidURLError) as exc:
            raise HelixError(
                ErrorKind.INVALID_REQUEST, "The request's path or one of its headers holds what HTTP does not allow."
            ) from exc


async def _pass_back(exchange: Exchange, response: HttpResponse) -> None:
    if response.status not in _STATUSES:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, f"The status {response.status} is none of HTTP's.")
    received = [*response.repeated, *response.headers.items()]
    headers = [header for header in _end_to_end(received) if header[0] not in _NOT_PASSED_BACK]
    await exchange.start(response.status, headers)
    while piece := await response.read():
        await exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
    await exchange.finish()


def _end_to_end(headers: Iterable[Header]) -> Iterator[Header]:
    """Those that are not about the connection, be it because `Connection` names them."""
    headers = list(headers)
    named = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    return (header for header in headers if header[0] not in _HOP_BY_HOP and header[0] not in named)


def _is_ours(name: bytes) -> bool:
    """Also where it is spelt with underscores, which some frameworks take for the same."""
    name = name.replace(b"_", b"-")
    return name in _OURS or name.startswith(_OUR_PREFIXES)


def _target_of(raw: bytes) -> str:
    """Path and query as they came, undecoded. Raises `ValueError` for a path that is ours only once it is decoded."""
    url = httptools.parse_url(raw)
    path = (url.path or b"/").decode("ascii")
    if not is_control_plane(path):
        raise ValueError("the path is not spelt plainly")
    return f"{path}?{url.query.decode('ascii')}" if url.query is not None else path


def _as_ours(error: HelixError) -> HelixError:
    """What the transport says of a model's server, said of the control process."""
    match error.kind:
        case ErrorKind.UPSTREAM_UNAVAILABLE | ErrorKind.OVERLOADED:
            message = "The administration service cannot be reached now. Try again."
            return HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=1)
        case ErrorKind.UPSTREAM_INVALID:
            return HelixError(ErrorKind.UPSTREAM_INVALID, "The administration service broke off its answer.")
        case ErrorKind.DEADLINE:
            return HelixError(ErrorKind.DEADLINE, "The administration service did not answer in time.")
    return HelixError(error.kind, error.message, retry_after_s=error.retry_after_s)
