"""The audit log of a running platform, through the admin API."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar
from urllib.parse import urlencode

import msgspec

from helixflow.cli.api import MAX_BODY_BYTES, ApiClient
from helixflow.cli.target import choose_target
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.settings.client import client_environment

if TYPE_CHECKING:
    from helixflow.settings.tree import Settings

T = TypeVar("T")

_PAGE: Final = 100
# How an export ends that has not broken off; see docs/reference/audit-log.md.
_END: Final = b'"type":"end"}\n'
_SPAN: Final = re.compile(r"([0-9]{1,6})([hdw])")
_SPAN_S: Final = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


def query_of(
    since: str | None, until: str | None, installation: bool, filters: Mapping[str, str | None]
) -> dict[str, str]:
    """The parameters of a request. Raises `UserError` (USAGE)."""
    query = {name: value for name, value in filters.items() if value}
    for name, text in (("since", since), ("until", until)):
        if text is not None:
            query[name] = parse_moment(text, time.time(), f"--{name}")
    if installation:
        query["installation"] = "true"
    return query


def parse_moment(text: str, now: float, option: str) -> str:
    """A time of RFC 3339 for `7d` (ago), `12h`, `2w`, a date or a time, UTC unless it says otherwise."""
    try:
        if (match := _SPAN.fullmatch(text.strip().lower())) is not None:
            moment = datetime.fromtimestamp(max(0, int(now) - int(match[1]) * _SPAN_S[match[2]]), UTC)
        else:
            moment = datetime.fromisoformat(text.strip())
            moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        message = f"{option} {text!r}: give a span (7d, 12h, 2w), a date (2027-01-31) or a time"
        raise UserError(message, ExitCode.USAGE) from exc
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def list_records(settings: "Settings", query: Mapping[str, str], limit: int) -> list[dict[str, Any]]:
    """Up to `limit` records, newest first, as the API gives them. Raises `HelixError`."""

    async def collect(client: ApiClient) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        cursor = None
        while len(records) < limit:
            page = {**query, "limit": str(min(_PAGE, limit - len(records)))}
            response = await client.open(f"/audit/records?{urlencode(page | ({'cursor': cursor} if cursor else {}))}")
            try:
                answer = msgspec.json.decode(await response.read_all(MAX_BODY_BYTES))
            finally:
                response.close()
            records += answer["data"]
            cursor = answer["next_cursor"]
            if not cursor:
                break
        return records

    return _ask(settings, collect)


def export_log(settings: "Settings", query: Mapping[str, str], out: BinaryIO) -> None:
    """Writes an export to `out` as it comes. Raises `HelixError`, UPSTREAM_INVALID for one that breaks off."""

    async def copy(client: ApiClient) -> None:
        response = await client.open(f"/audit/export?{urlencode(query)}")
        tail = b""
        try:
            while data := await response.read():
                out.write(data)
                tail = (tail + data)[-len(_END) :]
        finally:
            response.close()
        if tail != _END:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The export broke off; export again.")
        out.flush()

    _ask(settings, copy)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file for its owner alone, at `path` once it is complete; nothing is left of one that is not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _ask(settings: "Settings", question: Callable[[ApiClient], Awaitable[T]]) -> T:
    # A key for somebody else's models has no business here.
    target = choose_target(settings, replace(client_environment(), openai_api_key=None), None, None)

    async def put() -> T:
        client = ApiClient(f"{target.base_url.rstrip('/').removesuffix('/v1')}/api/v1", target.api_key)
        try:
            return await question(client)
        except HelixError as exc:
            if target.ours and exc.kind is ErrorKind.UPSTREAM_UNAVAILABLE:
                message = f"{exc.message}; start the service with: helixflow serve"
                raise UserError(message, ExitCode.UNAVAILABLE) from exc
            raise
        finally:
            await client.close()

    return asyncio.run(put())
