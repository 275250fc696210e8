"""Requests for benchmarks of the ledger: as a shipper sends them, or millions of them straight into the tables."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.metering.rows import Positioned, RequestRow
from helixflow.settings.tree import Settings
from helixflow.storage.engine import locate
from helixflow.storage.location import Access
from tests.harness.postgres import PostgresServer

ORGANISATION: Final = "org_" + "1" * 24
PROJECTS, KEYS, MODELS = 50, 500, 4
# The month that they are of, seconds since the epoch: November 2026, UTC.
MONTH_BEGIN: Final = 1_793_491_200
MONTH_DAYS: Final = 30
MONTH_END: Final = MONTH_BEGIN + MONTH_DAYS * 86_400
_DAY_MS: Final = 86_400_000

# `at` and `i` in hexadecimal.
_CALL_ID: Final = {
    "sqlite": "format('%012x%020x', at, i)",
    "postgresql": "lpad(to_hex(at), 12, '0') || lpad(to_hex(i), 20, '0')",
}
_ROWS: Final = """
    WITH RECURSIVE numbers (i) AS (
        SELECT CAST(:begin AS BIGINT) UNION ALL SELECT i + 1 FROM numbers WHERE i + 1 < :end
    ), made AS (
        SELECT i, :day_ms + (i - :begin) * 86400000 / (:end - :begin) AS at, 100 + i % 900 AS prompt, i % 500 AS answer
        FROM numbers
    )
    INSERT INTO requests
    SELECT {call_id}, at, 'req_' || i, '{organisation}', 'proj_' || (i % {projects}), 'key_' || (i % {keys}), '',
        'model-' || (i / {keys} % {models}), 'model-' || (i / {keys} % {models}) || '/llama_cpp-0',
        'openai', 'chat/completions',
        true, 200, CASE WHEN i % 100 = 0 THEN 'failed' ELSE 'completed' END, '', prompt, i % 100, answer, 0, false,
        1, 200, 3000, 2800, prompt * 150 + answer * 600, '0123456789abcdef', '', ''
    FROM made
"""
_GROUPS: Final = "project_id, key_id, user_id, model, deployment, operation"
_SUMS: Final = "sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), sum(reasoning_tokens), sum(cost)"
_HOURLY: Final = f"""
    INSERT INTO usage_hourly
    SELECT organisation_id, admitted_at_ms / 3600000 * 3600 AS hour, {_GROUPS},
        count(*), sum(CASE WHEN outcome = 'failed' THEN 1 ELSE 0 END), {_SUMS}
    FROM requests WHERE organisation_id = '{ORGANISATION}' AND admitted_at_ms >= :day_ms
    GROUP BY organisation_id, hour, {_GROUPS}
"""
_DAILY: Final = f"""
    INSERT INTO usage_daily
    SELECT organisation_id, start / 86400 * 86400 AS day, {_GROUPS}, sum(requests), sum(failed_requests), {_SUMS}
    FROM usage_hourly WHERE organisation_id = '{ORGANISATION}' AND start >= CAST(:day_ms AS BIGINT) / 1000
    GROUP BY organisation_id, day, {_GROUPS}
"""


def make_rows(count: int) -> list[Positioned]:
    """One after the other, one in ten with tags. A key is of one project, and uses one model nine times of ten."""
    chance = random.Random(1)
    rows = []
    for number in range(count):
        at_ms = MONTH_BEGIN * 1000 + 40 * number
        key = chance.randrange(KEYS)
        model = f"model-{(key if chance.random() < 0.9 else number) % MODELS}"
        call_id = f"{at_ms:012x}{chance.getrandbits(80):020x}"
        row = RequestRow(
            call_id=call_id,
            admitted_at_ms=at_ms + chance.randrange(20),
            request_id=f"req_{call_id}",
            organisation_id=ORGANISATION,
            project_id=f"proj_{key % PROJECTS:024x}",
            key_id=f"key_{key:024x}",
            user_id=f"user_{key % 50:024x}",
            model=model,
            deployment=f"{model}/llama_cpp-0",
            dialect="openai",
            operation="chat/completions",
            stream=True,
            status=200,
            outcome="completed",
            error="",
            prompt_tokens=500,
            cached_tokens=0,
            completion_tokens=200,
            reasoning_tokens=0,
            estimated=False,
            queue_ms=1,
            first_token_ms=200,
            duration_ms=3000,
            engine_ms=2800,
            cost=123_456,
            price_version="0123456789abcdef",
            tags='{"team":"search","job":"nightly"}' if number % 10 == 0 else "",
            explanation='{"authorised_by":"key","policies":["lim_0123456789abcdef01234567","bud_0123456789abcdef01234567"'
            '],"reserved_tokens":1200,"reserved_cost":400000,"journal_id":"0123456789abcdef01234567"}',
        )
        rows.append((100 * (number + 1), row))
    return rows


async def fill_month(settings: Settings, count: int) -> None:
    """So many requests of one organisation, evenly over a month, and their roll-ups."""
    location = locate(settings)
    engine = location.create_engine(migrating=True)
    per_day = count // MONTH_DAYS
    try:
        for day in range(MONTH_DAYS):
            async with location.with_access(engine, Access.WRITING).begin() as connection:
                await _fill_day(connection, day * per_day, (day + 1) * per_day, MONTH_BEGIN * 1000 + day * _DAY_MS)
        if settings.database.url != "sqlite":
            async with engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(text("VACUUM ANALYZE"))
    finally:
        await engine.dispose()


async def _fill_day(connection: AsyncConnection, begin: int, end: int, day_ms: int) -> None:
    kind = connection.dialect.name
    if kind == "sqlite":
        await connection.execute(text("PRAGMA cache_size = -262144"))
    names = {"organisation": ORGANISATION, "projects": PROJECTS, "keys": KEYS, "models": MODELS}
    statement = text(_ROWS.format(call_id=_CALL_ID[kind], **names))
    await connection.execute(statement, {"begin": begin, "end": end, "day_ms": day_ms})
    for roll_up in (_HOURLY, _DAILY):
        await connection.execute(text(roll_up), {"day_ms": day_ms})


@contextlib.contextmanager
def both_kinds(folder: Path) -> Iterator[list[tuple[str, Settings]]]:
    """Names and settings of two empty databases. Raises `RuntimeError` where there is no PostgreSQL."""
    try:
        server = PostgresServer.create()
    except AssertionError as exc:
        raise RuntimeError(str(exc)) from exc
    try:
        with server.database() as url:
            postgresql = Settings(data_dir=folder / "postgresql", database=server.settings(url, folder))
            yield [("SQLite", Settings(data_dir=folder / "sqlite")), ("PostgreSQL", postgresql)]
    finally:
        server.remove()
