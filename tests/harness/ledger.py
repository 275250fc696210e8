"""Requests as gateways would have settled them, shipments of them, and what the ledger then holds."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Table, case, func, select

from helixflow.metering.rows import RequestRow, encode_rows
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.storage.engine import Database
from helixflow.storage.schema import requests, usage_daily, usage_daily_tags, usage_hourly

JOURNAL: Final = "a" * 24
OTHER_JOURNAL: Final = "b" * 24
NODE: Final = "node_1"
# 2026-11-23 04:00 UTC.
NOW: Final = 1_795_406_400
NOW_MS: Final = NOW * 1000
ROLL_UPS: Final = (usage_hourly, usage_daily, usage_daily_tags)
SUMS: Final = (
    "requests",
    "failed_requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cost",
)


def make_row(number: int, *, tags: Mapping[str, str] | None = None, **changes: Any) -> RequestRow:
    """Request number so many: 7 prompt tokens, 2 of them cached, 3 completion tokens, 1 of them reasoning, cost 11."""
    admitted_at_ms = changes.get("admitted_at_ms", NOW_MS)
    values: dict[str, Any] = {
        "call_id": f"{admitted_at_ms:012x}{number:020x}",
        "admitted_at_ms": admitted_at_ms,
        "request_id": f"req_{number}",
        "organisation_id": "org_1",
        "project_id": "proj_1",
        "key_id": "key_1",
        "user_id": "",
        "model": "m",
        "deployment": "m/llama_cpp-0",
        "dialect": "openai",
        "operation": "chat/completions",
        "stream": True,
        "status": 200,
        "outcome": "completed",
        "error": "",
        "prompt_tokens": 7,
        "cached_tokens": 2,
        "completion_tokens": 3,
        "reasoning_tokens": 1,
        "estimated": False,
        "queue_ms": 0,
        "first_token_ms": 20,
        "duration_ms": 300,
        "engine_ms": 290,
        "cost": 11,
        "price_version": "0123456789abcdef",
        "tags": msgspec.json.encode(tags).decode() if tags else "",
        "explanation": "",
    }
    return RequestRow(**{**values, **changes})


def ship(
    rows: Sequence[tuple[int, RequestRow]],
    *,
    journal_id: str = JOURNAL,
    position: int | None = None,
    closes: bool = False,
    quarantined: int = 0,
) -> pb.ShipRecordsRequest:
    """A shipment that ends at `position`, by default with its last row."""
    return pb.ShipRecordsRequest(
        journal_id=journal_id,
        node_id=NODE,
        rows=encode_rows(rows),
        position=rows[-1][0] if position is None else position,
        closes=closes,
        quarantined=quarantined,
    )


async def total(database: Database, table: Table = requests) -> tuple[int, ...]:
    """The sums of all rows of `requests` or of a roll-up, in the order of `SUMS`."""
    if table is requests:
        failed = func.sum(case((requests.c.outcome == "failed", 1), else_=0))
        columns = [func.count(), failed, *(func.sum(requests.c[name]) for name in SUMS[2:])]
    else:
        columns = [func.sum(table.c[name]) for name in SUMS]
    row = await database.fetch_one(select(*columns))
    assert row is not None
    return tuple(int(value or 0) for value in row)


async def check_sums(database: Database) -> tuple[int, ...]:
    """Asserts that the ledger agrees with itself; the sums."""
    rows = await total(database)
    assert await total(database, usage_hourly) == rows
    assert await total(database, usage_daily) == rows
    return rows
