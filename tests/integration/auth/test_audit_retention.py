"""What is too old goes, up to a checkpoint, as an act of its own; what is left verifies."""

import io
import json

import pytest
from sqlalchemy import insert, select

from helixflow.auth.audit import retention
from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.audit.export import BATCH
from helixflow.auth.audit.retention import DAY_S, prune
from helixflow.auth.audit.verify import Verified, verify
from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.organisations import NEW_ORGANISATION
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.storage.engine import Database
from helixflow.storage.schema import audit_checkpoints, audit_records, organisations
from tests.harness.audit import ORGANISATION, AuditLog

DAYS = 30
OPERATOR = Caller(CallerKind.ACCOUNT, "user_op", "Op", ORGANISATION, operator=True)


async def make_organisation(database: Database, *, days: int = DAYS, organisation_id: str = ORGANISATION) -> None:
    async with database.writing() as connection:
        values = {**NEW_ORGANISATION, "id": organisation_id, "name": "One", "audit_retention_days": days}
        await connection.execute(insert(organisations).values(**values, created_at=0, updated_at=0, version=1))


async def kept(database: Database, organisation_id: str = ORGANISATION) -> list[int]:
    query = select(audit_records.c.sequence).where(audit_records.c.organisation_id == organisation_id)
    return [row.sequence for row in await database.fetch_all(query.order_by(audit_records.c.sequence))]


async def check(log: AuditLog) -> tuple[Verified, list[dict[str, object]]]:
    lines = await log.export()
    return verify(io.BytesIO(b"".join(lines))), [json.loads(line) for line in lines]


async def add_day(log: AuditLog, *targets: str) -> None:
    await log.add(*targets)
    await log.checkpoints.sign_due(log.now)
    log.clock.advance(DAY_S)


async def test_old_records_go_and_the_rest_verifies(database: Database) -> None:
    await make_organisation(database)
    log = AuditLog(database)
    for day in range(40):
        await add_day(log, f"{day}a", f"{day}b")
    # Forty days have passed; those of the first ten days are older than thirty.
    assert await prune(database, log.now, 0) == 20
    assert await kept(database) == list(range(21, 82))
    verified, lines = await check(log)
    assert (verified.first, verified.last) == (21, 82)
    # The last checkpoint of what went vouches for where the rest begins.
    assert (lines[1]["type"], lines[1]["sequence"]) == ("checkpoint", 20)
    (act,) = (line for line in lines if line.get("action") == "prune_audit_log")
    assert (act["actor_kind"], act["target_kind"], act["target_id"]) == ("system", "audit_log", ORGANISATION)
    assert act["before"] == '{"first_sequence":1}'
    assert json.loads(str(act["after"]))["first_sequence"] == 21
    assert await prune(database, log.now, 0) == 0


async def test_pruning_does_not_feed_itself(database: Database) -> None:
    await make_organisation(database)
    log = AuditLog(database)
    await add_day(log, "1")
    acts = 0
    for _ in range(3 * DAYS):
        await log.checkpoints.sign_due(log.now)
        acts += await prune(database, log.now, 0) > 0
        log.clock.advance(DAY_S)
    assert acts == 2
    assert len(await kept(database)) == 1


async def test_records_go_on_after_all_were_pruned(database: Database) -> None:
    await make_organisation(database)
    log = AuditLog(database)
    await add_day(log, "1", "2")
    log.clock.advance(100 * DAY_S)
    assert await prune(database, log.now, 0) == 2
    await log.add("4")
    assert await kept(database) == [3, 4]
    assert (await check(log))[0].first == 3


async def test_without_a_retention_nothing_goes(database: Database) -> None:
    await make_organisation(database, days=0)
    log = AuditLog(database)
    await log.add("1", organisation_id=INSTALLATION)
    await add_day(log, "1")
    log.clock.advance(10_000 * DAY_S)
    assert await prune(database, log.now, 0) == 0
    assert await kept(database) == [1]
    assert await kept(database, INSTALLATION) == [1]


async def test_the_installation_s_own_log_is_kept_as_long_as_the_settings_say(database: Database) -> None:
    await make_organisation(database, days=0)
    log = AuditLog(database)
    await log.add("1")
    for day in range(40):
        await log.add(f"{day}", organisation_id=INSTALLATION)
        await add_day(log)
    assert await prune(database, log.now, 0) == 0
    assert await prune(database, log.now, DAYS) == 10
    assert await kept(database, INSTALLATION) == list(range(11, 42))
    assert await kept(database) == [1]
    lines = await log.export(OPERATOR, installation=True)
    assert verify(io.BytesIO(b"".join(lines))).first == 11
    assert await prune(database, log.now, DAYS) == 0


async def test_one_organisation_does_not_prune_another(database: Database) -> None:
    await make_organisation(database)
    await make_organisation(database, days=3650, organisation_id="org_2")
    log = AuditLog(database)
    await log.add("1", organisation_id="org_2")
    await add_day(log, "1")
    log.clock.advance(100 * DAY_S)
    assert await prune(database, log.now, 0) == 1
    assert await kept(database, "org_2") == [1]


async def test_what_no_checkpoint_covers_stays(database: Database) -> None:
    await make_organisation(database)
    log = AuditLog(database)
    await log.add("1")
    log.clock.advance(100 * DAY_S)
    assert await prune(database, log.now, 0) == 0
    # Signed only now: its age counts from here.
    await log.checkpoints.sign_due(log.now)
    assert await prune(database, log.now, 0) == 0
    log.clock.advance((DAYS + 2) * DAY_S)
    assert await prune(database, log.now, 0) == 1


async def test_many_records_go_in_several_transactions(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_BATCH", 5)
    await make_organisation(database)
    log = AuditLog(database)
    await add_day(log, *map(str, range(20)))
    for day in range(6):
        await add_day(log, f"{day}a", f"{day}b")
    log.clock.advance(100 * DAY_S)
    assert await prune(database, log.now, 0) == 32
    # The first checkpoint is further away than a batch; then two go at a time.
    verified, lines = await check(log)
    assert [line["after"] for line in lines if line.get("action") == "prune_audit_log"] == [
        f'{{"first_sequence":{first},"records_before":{log.now - DAYS * DAY_S}}}' for first in (21, 25, 29, 33)
    ]
    assert verified.first == 33
    left = await database.fetch_all(select(audit_checkpoints.c.sequence).order_by(audit_checkpoints.c.sequence))
    assert left[0].sequence == 32


async def test_an_export_that_retention_overtakes_breaks_off(database: Database) -> None:
    await make_organisation(database)
    log = AuditLog(database)
    await add_day(log, *map(str, range(2 * BATCH)))
    log.clock.advance(100 * DAY_S)
    with pytest.raises(HelixError, match="export again") as broken:
        async for _ in log.stream_export():
            await prune(database, log.now, 0)
    assert broken.value.kind is ErrorKind.UNAVAILABLE
