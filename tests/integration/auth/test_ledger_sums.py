"""Whatever is shipped, in whatever pieces and however often: rows, roll-ups and spend agree."""

import asyncio
from collections import Counter
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.ledger.ledger import Ledger
from helixflow.auth.organisations import NEW_ORGANISATION
from helixflow.core.clock import FakeClock
from helixflow.metering.policies import DAY_MS
from helixflow.metering.rows import RequestRow
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.schema import api_keys, metadata, organisations, projects, usage_daily_tags
from tests.harness.ledger import NOW, NOW_MS, OTHER_JOURNAL, check_sums, make_row, ship

LEDGER_TABLES = ("journals", "requests", "usage_hourly", "usage_daily", "usage_daily_tags")
DAY = NOW_MS // DAY_MS

few = st.sampled_from
rows = st.builds(
    dict,
    admitted_at_ms=st.integers(NOW_MS - 2 * DAY_MS, NOW_MS),
    organisation_id=few(["org_1", "org_2"]),
    project_id=few(["proj_1", "proj_2"]),
    key_id=few(["key_1", "key_2", ""]),
    user_id=few(["", "user_1"]),
    model=few(["m", "n"]),
    operation=few(["chat/completions", "embeddings"]),
    outcome=few(["completed", "failed", "cancelled", "interrupted", "lost"]),
    prompt_tokens=st.integers(0, 2**40),
    completion_tokens=st.integers(0, 2**40),
    cost=st.integers(0, 2**50),
    tags=st.dictionaries(few(["team", "job", "Ä\u2028"]), few(["", "a", "b"]), max_size=3),
)
# Which rows each shipment is of: [from, to).
shipments = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6)


@given(described=st.lists(rows, min_size=1, max_size=12), pieces=shipments)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_and_roll_ups_and_spend_agree(
    database_settings: Settings, database: Database, described: list[dict[str, Any]], pieces: list[tuple[int, int]]
) -> None:
    made = [make_row(number, **each) for number, each in enumerate(described, 1)]
    asyncio.run(_check(database_settings, made, pieces))


async def _check(database_settings: Settings, made: list[RequestRow], pieces: list[tuple[int, int]]) -> None:
    database = open_database(database_settings)
    try:
        async with database.writing() as connection:
            for name in LEDGER_TABLES:
                await connection.execute(delete(metadata.tables[name]))
            await _add_key(connection)
        ledger = Ledger(database, FakeClock())
        numbered = list(enumerate(made, 1))
        # In order: what comes repeats what was shipped, or goes on where that ended or earlier.
        shipped = 0
        for begin, end in [*pieces, (0, len(made))]:
            part = numbered[min(begin, shipped) : end]
            if not part:
                continue
            shipped = max(shipped, part[-1][0])
            await ledger.ship_records(ship(part))
            # And all of it under another name.
            await ledger.ship_records(ship(part, journal_id=OTHER_JOURNAL))
            assert (await check_sums(database))[0] == shipped
        await _compare(ledger, database, made)
    finally:
        await database.close()


async def _add_key(connection: AsyncConnection) -> None:
    """The key that is asked for: what it was rotated to counts as well, so that it is looked up."""
    if (await connection.execute(select(api_keys.c.id))).first() is not None:
        return
    common = {"name": "n", "created_at": NOW, "updated_at": NOW, "version": 1}
    await connection.execute(insert(organisations).values(id="org_1", **NEW_ORGANISATION, **common))
    await connection.execute(insert(projects).values(id="proj_1", organisation_id="org_1", **common))
    key = {"id": "key_2", "hash": b"", "hint": "", "organisation_id": "org_1", "project_id": "proj_1", "owner_id": ""}
    rest: dict[str, Any] = {"scopes": [], "models": [], "networks": [], "superseded": False, "bootstrap": False}
    await connection.execute(insert(api_keys).values(created_by="", **key, **rest, priority=0, weight=100, **common))


async def _compare(ledger: Ledger, database: Database, made: list[RequestRow]) -> None:
    tags: Counter[tuple[str, str, str]] = Counter()
    for row in made:
        for tag, value in msgspec.json.decode(row.tags or "{}").items():
            tags[row.organisation_id, tag, value] += row.cost
    table = usage_daily_tags.c
    keys = table.organisation_id, table.tag, table.tag_value
    found = await database.fetch_all(select(*keys, func.sum(table.cost)).group_by(*keys))
    assert {(row[0], row[1], row[2]): int(row[3]) for row in found} == dict(tags)
    queries, expected = zip(*_questions(made), strict=True)
    answer = await ledger.read_spend(pb.ReadSpendRequest(queries=queries))
    assert tuple(answer.spent) == expected


def _questions(made: list[RequestRow]) -> list[tuple[pb.SpendQuery, int]]:
    """Queries of every kind, and their answers out of the rows."""
    subjects = [
        (pb.SCOPE_INSTALLATION, "", "", ""),
        (pb.SCOPE_ORGANISATION, "org_1", "org_1", "organisation_id"),
        (pb.SCOPE_PROJECT, "proj_1", "org_2", "project_id"),
        (pb.SCOPE_KEY, "key_2", "org_1", "key_id"),
    ]
    periods = [(0, 0), ((DAY - 1) * DAY_MS, DAY * DAY_MS), (DAY * DAY_MS, (DAY + 1) * DAY_MS)]
    questions = []
    for scope, subject_id, organisation_id, field in subjects:
        for begin, end in periods:
            rows = [
                row
                for row in made
                if (not end or begin <= row.admitted_at_ms < end)
                and (not field or (row.organisation_id == organisation_id and getattr(row, field) == subject_id))
            ]
            common: dict[str, Any] = {"scope": scope, "subject_id": subject_id, "organisation_id": organisation_id}
            common |= {"from_ms": begin, "to_ms": end}
            tokens = sum(row.prompt_tokens + row.completion_tokens for row in rows)
            questions.append((pb.SpendQuery(unit=pb.BUDGET_UNIT_MONEY, **common), sum(row.cost for row in rows)))
            questions.append((pb.SpendQuery(unit=pb.BUDGET_UNIT_TOKENS, **common), tokens))
    return questions
