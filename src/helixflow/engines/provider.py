"""Somebody else's server, as one deployment uses it: requests to it, and what its refusals mean."""

import asyncio
from collections.abc import Mapping
from typing import Final

import structlog

from helixflow.core.call import Call
from helixflow.core.capacity import ProviderLimits
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.provider_errors import event_refusal, read_error, refusal, retry_after
from helixflow.engines.provider_limits import read_limits
from helixflow.transport.client import HttpClient, HttpResponse, Timeouts, build_head
from helixflow.transport.origin import Origin

MAX_ANSWER_BYTES: Final = 64 * 2**20
_MAX_ERROR_BYTES: Final = 64 * 1024
# How long a server whose answer is whole may take to end it properly. Longer, and its connection is not kept.
_END_GRACE_S: Final = 0.25
_PROBE_TIMEOUTS: Final = Timeouts(connect_s=5, first_byte_s=10, idle_s=10)
# What the operator should know; the rest is the caller's, or a server that works as its limits say.
_FAULTS: Final = frozenset({ErrorKind.UPSTREAM_UNAVAILABLE, ErrorKind.UPSTREAM_INVALID, ErrorKind.DEADLINE})

# Whose form need not be looked at.
_USUAL_TYPES: Final = frozenset(
    form + charset
    for form in (b"application/json", b"text/event-stream")
    for charset in (b"", b"; charset=utf-8", b";charset=utf-8", b"; charset=UTF-8")
)

log = structlog.get_logger("helixflow.engines")


class Provider:
    """One server and the credentials for it."""

    def __init__(
        self,
        client: HttpClient,
        *,
        deployment: str,
        base_url: str,
        headers: Mapping[str, str],
        timeouts: Timeouts,
    ) -> None:
        """`headers` go with every request. Raises `ValueError` for a base URL or header that cannot be sent."""
        self.client = client
        self.deployment = deployment
        self.origin, self._base_path = Origin.parse(base_url)
        self.headers = {
            "content-type": "application/json",
            "accept-encoding": "identity",
            "user-agent": "helixflow",
            **{name.lower(): value for name, value in headers.items()},
        }
        self._timeouts = timeouts
        self.limits = ProviderLimits()

    def head(self, path: str, method: str = "POST") -> bytes:
        """For `post`: built once, used for every call. `path` is below the base URL."""
        return build_head(method, self._base_path + path, self.origin, self.headers.items())

    async def post(self, head: bytes, body: bytes, call: Call) -> HttpResponse:
        """An answer with status 200 that can be read. Close it.

        Raises `HelixError`: what the transport raises, and what `refusal` makes of any other status.
        """
        response = await self.client.request(self.origin, head, body, timeouts=self._timeouts, deadline=call.deadline)
        try:
            read_limits(response.headers, self.limits)
            if response.status != 200:
                raise await _refusal(response)
            headers = response.headers
            if headers.get(b"content-type") not in _USUAL_TYPES or b"content-encoding" in headers:
                _check_form(response)
        except BaseException:
            response.close()
            raise
        return response

    async def require_events(self, response: HttpResponse) -> None:
        """Raises `HelixError` where the answer is JSON and no stream of events: mostly an error with status 200."""
        if _media_type(response) == b"application/json":
            found = read_error(await _read_some(response))
            if found.message or found.code:  # an answer has a `type` too
                raise event_refusal(found)
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server answered without a stream.")

    async def get(self, head: bytes, deadline: float) -> None:
        """Asks for something that costs nothing, for a probe. Raises `HelixError` unless the answer is a success."""
        response = await self.client.request(self.origin, head, b"", timeouts=_PROBE_TIMEOUTS, deadline=deadline)
        try:
            if response.status != 200:
                raise await _refusal(response)
            await _read_some(response)
        finally:
            response.close()

    def report(self, error: HelixError) -> None:
        """One line for the operator, where it is the server's fault or the operator's own."""
        if error.kind in _FAULTS:
            cause = error.__cause__
            log.warning(
                "provider.failed",
                deployment=self.deployment,
                code=error.code,
                reason=error.message,
                cause="" if cause is None else f"{type(cause).__name__}: {cause}"[:300],
            )


async def settle(response: HttpResponse) -> None:
    """The answer is whole: a server that ends properly keeps its connection, one that goes on is cut off."""
    if response.connection is None:
        return
    try:
        async with asyncio.timeout(_END_GRACE_S):
            await response.read()
    except (HelixError, TimeoutError):
        pass
    response.close()


async def _refusal(response: HttpResponse) -> HelixError:
    error = read_error(await _read_some(response))
    return refusal(error, response.status, retry_after(response.headers))


async def _read_some(response: HttpResponse) -> bytes:
    """The body, or as much of it as any error needs."""
    data = b""
    while len(data) < _MAX_ERROR_BYTES and (piece := await response.read()):
        data += piece
    return data


def _check_form(response: HttpResponse) -> None:
    if response.headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HelixError(
            ErrorKind.UPSTREAM_INVALID, "The model's server compressed its answer, although it was asked not to."
        )
    if _media_type(response) == b"text/html":
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server answered with a web page.")


def _media_type(response: HttpResponse) -> bytes:
    return response.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
