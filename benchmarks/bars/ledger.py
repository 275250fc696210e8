"""How fast the ledger takes shipments in, on one core with its database, and how soon it tells a month's usage."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import psutil
from msgspec.structs import astuple
from sqlalchemy import text

from benchmarks.ledger_rows import MONTH_BEGIN, MONTH_END, ORGANISATION, PROJECTS, both_kinds, fill_month, make_rows
from benchmarks.load import percentile
from benchmarks.report import Options, Result, number
from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.ledger.ledger import Ledger
from helixflow.auth.ledger.partitions import make_partitions
from helixflow.auth.ledger.usage import query_usage
from helixflow.auth.unit import Unit
from helixflow.core.clock import FakeClock
from helixflow.core.permissions import ROLE_PERMISSIONS, Grants, Permission
from helixflow.metering.rows import Positioned, encode_rows
from helixflow.rpc.access import Access, Level
from helixflow.rpc.generated.auth_v1 import metering_pb2, usage_pb2
from helixflow.settings.tree import Settings
from helixflow.storage.bulk import insert_rows
from helixflow.storage.engine import Database, open_database
from helixflow.storage.schema import requests
from helixflow.storage.upgrade import upgrade
from helixflow.telemetry.logs import configure_logging

# A row comes from two records: admitted and settled.
RECORDS_A_SECOND: Final = 50_000.0
_RECORDS_A_ROW: Final = 2
# Everybody else who writes waits for a batch.
BATCH_LIMIT_MS: Final = 200.0
QUERY_LIMITS_MS: Final = {"SQLite": 300.0, "PostgreSQL": 100.0}
_BATCH: Final = 2_000
_QUERIES: Final = 20
T = TypeVar("T")
_ACCESS: Final = Access(Level.PROJECT, Permission("usage:read"), writes=False, idempotent=False)
_CALLER: Final = Caller(CallerKind.SYSTEM, organisation_id=ORGANISATION, grants=Grants(ROLE_PERMISSIONS))


def run(options: Options) -> list[Result]:
    configure_logging("error", "text", service="benchmarks")
    shipped, kept = (40_000, 100_000) if options.quick else (200_000, 10_000_000)
    rows = make_rows(shipped)
    results = []
    with tempfile.TemporaryDirectory(prefix="hf-") as name, both_kinds(Path(name)) as databases:
        for kind, settings in databases:
            results += asyncio.run(_measure_ingest(kind, settings, rows))
            results += asyncio.run(_measure_query(kind, settings, kept))
    return results


async def _measure_ingest(kind: str, settings: Settings, rows: list[Positioned]) -> list[Result]:
    await upgrade(settings)
    database = open_database(settings)
    try:
        await make_partitions(database, MONTH_BEGIN)
        ledger = Ledger(database, FakeClock(float(MONTH_BEGIN)))
        shipments = [_shipment(rows[begin : begin + _BATCH]) for begin in range(0, len(rows), _BATCH)]
        values = [astuple(row) for _, row in rows]
        batches = [values[begin : begin + _BATCH] for begin in range(0, len(values), _BATCH)]

        async def insert(batch: list[tuple[object, ...]]) -> None:
            async with database.writing() as connection:
                await insert_rows(connection, requests, batch)

        bare = await _time(insert, batches)
        await _empty(database)
        cpu = _cpu_s()
        times = await _time(ledger.ship_records, shipments)
        cpu_us = (_cpu_s() - cpu) / len(rows) * 1e6
        if ledger.figures.rows != len(rows):
            raise RuntimeError(f"the ledger took {ledger.figures.rows} of {len(rows)} rows")
        await _empty(database)
    finally:
        await database.close()
    rate, bare_rate = (_RECORDS_A_ROW * len(rows) / sum(each) for each in (times, bare))
    detail = (
        f"{len(rows):,} rows; {number(rate / bare_rate)} of bare inserts ({number(bare_rate)}/s);"
        f" {number(cpu_us)} µs of CPU a row, with the database's"
    )
    p50, p99 = (percentile(times, part) * 1000 for part in (0.5, 0.99))
    return [
        Result("ledger", f"{kind}: records taken in", rate, "/s", RECORDS_A_SECOND, at_least=True, detail=detail),
        Result("ledger", f"{kind}: {_BATCH:,} rows, p99", p99, "ms", BATCH_LIMIT_MS, detail=f"p50 {number(p50)} ms"),
    ]


async def _measure_query(kind: str, settings: Settings, count: int) -> list[Result]:
    begun = time.perf_counter()
    await fill_month(settings, count)
    filled_s = time.perf_counter() - begun
    database = open_database(settings)
    try:
        month = await _time_usage(database, MONTH_BEGIN, MONTH_END)
        # At worst: of the first day and of the last one the hours must be read, 23 of each.
        recent = await _time_usage(database, MONTH_BEGIN + 3_600, MONTH_END - 3_600)
    finally:
        await database.close()
    detail = f"of {count:,} rows, filled in {number(filled_s)} s; worst {number(max(month))} ms"
    return [
        Result(
            "ledger",
            f"{kind}: a month by project, p50",
            percentile(month, 0.5),
            "ms",
            QUERY_LIMITS_MS[kind],
            detail=detail,
        ),
        Result("ledger", f"{kind}: the same, not of whole days", percentile(recent, 0.5), "ms"),
    ]


async def _time_usage(database: Database, begin: int, end: int) -> list[float]:
    """Milliseconds of each question."""
    request = usage_pb2.QueryUsageRequest(group_by=["project"], page_size=1000, to=end)
    setattr(request, "from", begin)
    times = []
    for _ in range(_QUERIES):
        begun = time.perf_counter()
        async with database.reading() as connection:
            answer = await query_usage(Unit(connection, _CALLER, _ACCESS, "QueryUsage", MONTH_END), request)
        times.append((time.perf_counter() - begun) * 1000)
        if len(answer.rows) != PROJECTS:
            raise RuntimeError(f"usage of {len(answer.rows)} projects, not {PROJECTS}")
    return times


async def _time(do: Callable[[T], Awaitable[object]], batches: list[T]) -> list[float]:
    """Seconds of each."""
    times = []
    for batch in batches:
        begun = time.perf_counter()
        await do(batch)
        times.append(time.perf_counter() - begun)
    return times


def _cpu_s() -> float:
    """Of this process and its children, of which one is PostgreSQL."""
    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


async def _empty(database: Database) -> None:
    async with database.writing() as connection:
        # What PostgreSQL deletes stays in its tables for a while, which no ledger has.
        words = "DELETE FROM" if connection.dialect.name == "sqlite" else "TRUNCATE"
        for table in ("requests", "usage_hourly", "usage_daily", "usage_daily_tags", "journals"):
            await connection.execute(text(f"{words} {table}"))


def _shipment(rows: list[Positioned]) -> metering_pb2.ShipRecordsRequest:
    return metering_pb2.ShipRecordsRequest(
        journal_id="a" * 24, node_id="bench", rows=encode_rows(rows), position=rows[-1][0]
    )
