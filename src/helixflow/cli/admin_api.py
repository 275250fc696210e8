"""A client of the admin API: JSON in, JSON out, problems as errors."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import urlencode

import msgspec

from helixflow.cli.api import MAX_BODY_BYTES, MAX_ERROR_BYTES
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.transport.client import HttpClient, HttpResponse, Timeouts, build_head
from helixflow.transport.origin import Origin

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_PAGE: Final = 100
_TIMEOUTS: Final = Timeouts(connect_s=10, first_byte_s=30, idle_s=30)
# Pieces of a long answer come as the database gives them.
_STREAM_TIMEOUTS: Final = Timeouts(connect_s=10, first_byte_s=600, idle_s=300)
_KINDS: Final = {kind.value: kind for kind in ErrorKind}


class _FieldError(msgspec.Struct):
    param: str = ""
    message: str = ""


class _Problem(msgspec.Struct):
    detail: str = ""
    code: str = ""
    errors: list[_FieldError] = []


class AdminApi:
    """The admin API under `root_url` (without /api/v1). Close it where it was used."""

    def __init__(self, root_url: str, credential: str | None) -> None:
        """Raises `UserError` (USAGE) for a URL or credential that cannot be sent, or must not: over the network only
        with TLS.
        """
        try:
            self._origin, path = Origin.parse(root_url)
        except ValueError as exc:
            raise UserError(f"base URL {root_url!r}: {exc}", ExitCode.USAGE) from exc
        if self._origin.scheme != "https" and self._origin.host not in LOOPBACK:
            raise UserError(
                f"{root_url}: credentials travel over the network with TLS only; give an https:// URL", ExitCode.USAGE
            )
        self.root_url = root_url
        self._path = f"{path}/api/v1"
        self._headers = [("user-agent", "helixflow"), ("accept-encoding", "identity")]
        if credential is not None:
            self._headers.append(("authorization", f"Bearer {credential}"))
        self._client = HttpClient(max_connections=1)

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        *,
        if_version: int | None = None,
    ) -> Any:
        """What the API answers, None when that is nothing. `query` leaves out what is None; nothing is done unless
        what it is about has the version `if_version`, if one is given.

        Raises `HelixError`: the API's own error, or UPSTREAM_UNAVAILABLE when nothing answers.
        """
        more = [("if-match", f'"{if_version}"')] if if_version is not None else []
        async with self._send(method, path, body, query, _TIMEOUTS, more) as response:
            answer = await response.read_all(MAX_BODY_BYTES)
        try:
            return msgspec.json.decode(answer) if answer else None
        except msgspec.DecodeError as exc:
            raise _not_ours(self.root_url) from exc

    @asynccontextmanager
    async def open(self, path: str, query: Mapping[str, Any] | None = None) -> AsyncIterator[HttpResponse]:
        """What is at `path`, to be read piece by piece, for what does not fit into memory. Raises as `ask` does."""
        async with self._send("GET", path, None, query, _STREAM_TIMEOUTS) as response:
            yield response

    async def collect(self, path: str, query: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """All entries of a list, page by page. Raises `HelixError`."""
        entries: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = await self.ask("GET", path, query={**(query or {}), "limit": _PAGE, "cursor": cursor})
            entries += page["data"]
            cursor = page["next_cursor"]
            if cursor is None:
                return entries

    async def close(self) -> None:
        await self._client.close()

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, Any] | None,
        timeouts: Timeouts,
        more_headers: Sequence[tuple[str, str]] = (),
    ) -> AsyncIterator[HttpResponse]:
        """The response of what was done, once its head is there."""
        given = {name: value for name, value in (query or {}).items() if value is not None}
        headers = [*self._headers, *more_headers]
        if body is not None:
            headers.append(("content-type", "application/json"))
        try:
            target = self._path + path + (f"?{urlencode(given)}" if given else "")
            head = build_head(method, target, self._origin, headers)
            payload = b"" if body is None else msgspec.json.encode(body)
        except UnicodeEncodeError as exc:
            raise UserError("the request cannot be sent: what was given is not UTF-8 text", ExitCode.USAGE) from exc
        except ValueError as exc:
            raise UserError(f"the request cannot be sent: {exc}", ExitCode.USAGE) from exc
        try:
            response = await self._client.request(self._origin, head, payload, timeouts=timeouts)
        except HelixError as exc:
            raise HelixError(exc.kind, f"nothing answers at {self.root_url}") from exc
        try:
            if response.status >= 300:
                raise _refusal(response.status, await response.read_all(MAX_ERROR_BYTES), self.root_url)
            yield response
        finally:
            response.close()


def _refusal(status: int, body: bytes, root_url: str) -> HelixError:
    """The API's own error; something else's is told by its status."""
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except msgspec.DecodeError:
        return _not_ours(root_url)
    kind = _KINDS.get(problem.code, ErrorKind.UNAVAILABLE if status >= 500 else ErrorKind.INVALID_REQUEST)
    message = problem.detail
    if len(problem.errors) > 1:
        message = "\n".join(f"{found.param}: {found.message}" for found in problem.errors)
    param = problem.errors[0].param if len(problem.errors) == 1 else None
    return HelixError(
        kind, message or f"{root_url} answered with status {status}.", param=param or None, code=problem.code or None
    )


def _not_ours(root_url: str) -> HelixError:
    return HelixError(ErrorKind.UPSTREAM_INVALID, f"{root_url} does not answer as HelixFlow does.")
