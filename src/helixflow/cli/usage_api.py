"""Usage and requests of a running platform, through the admin API."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from helixflow.cli.moments import parse_past

if TYPE_CHECKING:
    from helixflow.cli.admin_api import AdminApi

_PAGE: Final = 100


def range_of(since: str | None, until: str | None) -> dict[str, str]:
    """The parameters of a range of time. Raises `UserError` (USAGE)."""
    given = (("from", since), ("to", until))
    return {name: parse_past(text, time.time(), f"--{name}") for name, text in given if text is not None}


def query_of(
    group_by: Sequence[str], since: str | None, until: str | None, filters: Mapping[str, str | None]
) -> dict[str, str]:
    """The parameters of a question about usage. Raises `UserError` (USAGE)."""
    # What may hold commas itself comes last.
    names = sorted(group_by, key=lambda name: "tag:" in name)
    given = {name: value for name, value in filters.items() if value}
    return {"group_by": ",".join(names), **range_of(since, until), **given}


async def read_report(api: "AdminApi", query: Mapping[str, str], limit: int | None) -> dict[str, Any]:
    """A report with up to `limit` entries (None: all). Raises `HelixError`."""
    entries: list[dict[str, Any]] = []
    cursor = None
    while True:
        size = _PAGE if limit is None else min(_PAGE, limit - len(entries))
        report: dict[str, Any] = await api.ask("GET", "/usage", query={**query, "limit": size, "cursor": cursor})
        entries += report["data"]
        cursor = report["next_cursor"]
        if cursor is None or (limit is not None and len(entries) >= limit):
            return {**report, "data": entries}


async def export(api: "AdminApi", query: Mapping[str, str], format: str, out: BinaryIO) -> None:
    """Writes all rows to `out`: as CSV as they come, as JSON in one document. Raises `HelixError`."""
    if format == "json":
        report = await read_report(api, query, None)
        del report["next_cursor"]
        out.write(json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    else:
        async with api.open("/usage", {**query, "format": format}) as response:
            while data := await response.read():
                out.write(data)
    out.flush()


async def list_requests(api: "AdminApi", query: Mapping[str, str], limit: int) -> list[dict[str, Any]]:
    """Up to `limit` requests, newest first. Raises `HelixError`."""
    requests: list[dict[str, Any]] = []
    cursor = None
    while len(requests) < limit:
        page = {**query, "limit": min(_PAGE, limit - len(requests)), "cursor": cursor}
        answer = await api.ask("GET", "/requests", query=page)
        requests += answer["data"]
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    return requests
