"""The audit log of a running platform, through the admin API."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from helixflow.cli.moments import parse_past
from helixflow.core.errors import ErrorKind, HelixError

if TYPE_CHECKING:
    from helixflow.cli.admin_api import AdminApi

_PAGE: Final = 100
# How an export ends that has not broken off; see docs/reference/audit-log.md.
_END: Final = b'"type":"end"}\n'


def query_of(
    since: str | None, until: str | None, installation: bool, filters: Mapping[str, str | None]
) -> dict[str, str]:
    """The parameters of a request. Raises `UserError` (USAGE)."""
    query = {name: value for name, value in filters.items() if value}
    for name, text in (("since", since), ("until", until)):
        if text is not None:
            query[name] = parse_past(text, time.time(), f"--{name}")
    if installation:
        query["installation"] = "true"
    return query


async def list_records(api: "AdminApi", query: Mapping[str, str], limit: int) -> list[dict[str, Any]]:
    """Up to `limit` records, newest first, as the API gives them. Raises `HelixError`."""
    records: list[dict[str, Any]] = []
    cursor = None
    while len(records) < limit:
        page = {**query, "limit": min(_PAGE, limit - len(records)), "cursor": cursor}
        answer = await api.ask("GET", "/audit/records", query=page)
        records += answer["data"]
        cursor = answer["next_cursor"]
        if not cursor:
            break
    return records


async def export_log(api: "AdminApi", query: Mapping[str, str], out: BinaryIO) -> None:
    """Writes an export to `out` as it comes. Raises `HelixError`, UPSTREAM_INVALID for one that breaks off."""
    tail = b""
    async with api.open("/audit/export", query) as response:
        while data := await response.read():
            out.write(data)
            tail = (tail + data)[-len(_END) :]
    if tail != _END:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The export broke off; export again.")
    out.flush()


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
