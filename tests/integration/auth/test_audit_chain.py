"""The chain in a real database: gapless whoever writes, append-only, and nothing without its act."""

import ast
import asyncio
from pathlib import Path

import pytest
from sqlalchemy import select

import helixflow
from helixflow.auth.audit.chain import append, record_of
from helixflow.auth.audit.entry import INSTALLATION, AuditEntry, Outcome
from helixflow.auth.audit.record import NO_HASH, Record, hash_of
from helixflow.auth.caller import Caller, CallerKind, Source
from helixflow.core.keys import generate_key
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.schema import audit_heads, audit_records
from tests.harness.audit import ALICE, ORGANISATION, AuditLog

SOURCE = Path(helixflow.__file__).parent


async def read_chain(database: Database, organisation_id: str = ORGANISATION) -> list[Record]:
    query = select(audit_records).where(audit_records.c.organisation_id == organisation_id)
    return [record_of(row) for row in await database.fetch_all(query.order_by(audit_records.c.sequence))]


def assert_whole(records: list[Record]) -> None:
    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
    previous = NO_HASH
    for record in records:
        assert record.previous_hash == previous.hex()
        previous = hash_of(record)
        assert record.hash == previous.hex()


async def test_records_follow_each_other_in_each_organisation(database: Database) -> None:
    log = AuditLog(database)
    await log.add("proj_1", "proj_2")
    await log.add("proj_3", organisation_id="org_2")
    await log.add("proj_4", organisation_id=INSTALLATION)
    await log.add("proj_5")
    for organisation_id, targets in (
        (ORGANISATION, ["proj_1", "proj_2", "proj_5"]),
        ("org_2", ["proj_3"]),
        (INSTALLATION, ["proj_4"]),
    ):
        records = await read_chain(database, organisation_id)
        assert_whole(records)
        assert [record.target_id for record in records] == targets


async def test_one_transaction_may_write_to_several_chains(database: Database) -> None:
    entries = [AuditEntry(chain, ALICE, "a", "", str(number)) for number, chain in enumerate(["x", "y", "x", "x", "y"])]
    async with database.writing() as connection:
        await append(connection, entries, 5)
    assert [record.target_id for record in await read_chain(database, "x")] == ["0", "2", "3"]
    assert [record.target_id for record in await read_chain(database, "y")] == ["1", "4"]
    assert_whole(await read_chain(database, "x"))


async def test_a_record_says_who_what_from_where(database: Database) -> None:
    log = AuditLog(database)
    entry = AuditEntry(
        ORGANISATION, ALICE, "update_key", "key", "key_1", {"name": "a"}, {"name": "b"}, Outcome.DENIED, "not_found"
    )
    async with database.writing() as connection:
        await append(connection, [entry], log.now)
    (record,) = await read_chain(database)
    assert record == Record(
        organisation_id=ORGANISATION,
        sequence=1,
        at=log.now,
        actor_kind="account",
        actor_id="user_alice",
        actor_name="Alice",
        action="update_key",
        outcome="denied",
        reason="not_found",
        target_kind="key",
        target_id="key_1",
        before='{"name":"a"}',
        after='{"name":"b"}',
        address="203.0.113.7",
        request_id="req_1",
        previous_hash="0" * 64,
        hash=record.hash,
    )


async def test_two_processes_that_write_at_once_leave_no_gap(database: Database, database_settings: Settings) -> None:
    other = open_database(database_settings)
    logs = [AuditLog(database), AuditLog(other)]
    try:
        await asyncio.gather(*(logs[number % 2].add(f"{number}a", f"{number}b") for number in range(40)))
    finally:
        await other.close()
    records = await read_chain(database)
    assert len(records) == 80
    assert_whole(records)


async def test_an_act_that_fails_leaves_no_record(database: Database) -> None:
    log = AuditLog(database)
    await log.add("proj_1")
    with pytest.raises(TypeError):
        async with database.writing() as connection:
            entry = AuditEntry(ORGANISATION, ALICE, "a", "", "", after={"a": object()})
            await append(connection, [AuditEntry(ORGANISATION, ALICE, "a", "", ""), entry], 5)
    await log.add("proj_2")
    records = await read_chain(database)
    assert [record.target_id for record in records] == ["proj_1", "proj_2"]
    assert_whole(records)


async def test_hostile_text_and_secrets_do_not_break_the_chain(database: Database) -> None:
    secret = generate_key()
    caller = Caller(CallerKind.KEY, "a\0b", f"\ud800 {secret}", source=Source("';--", "\x1b[2J", ""))
    state = {"name": "\0'; DROP TABLE audit_records; --\ud83d", "password": "hunter2", "x": secret, "big": "ö" * 10**6}
    async with database.writing() as connection:
        await append(connection, [AuditEntry(ORGANISATION, caller, "a", "k", "t\udfff" * 2000, state, state)], 5)
    (record,) = await read_chain(database)
    assert_whole([record])
    assert secret not in str(record)
    assert "hunter2" not in str(record)
    assert record.actor_id == "a\ufffdb"
    assert len(record.target_id) < 1100


async def test_nothing_recorded_costs_nothing() -> None:
    # Not even a connection is looked at.
    await append(None, [], 5)  # type: ignore[arg-type]


def test_nothing_in_the_code_changes_or_deletes_a_record_but_retention() -> None:
    changing: dict[tuple[str, str], set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("update", "delete"):
                named = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                for table in named & {"audit_records", "audit_checkpoints", "audit_heads"}:
                    changing.setdefault((node.func.id, table), set()).add(path.relative_to(SOURCE).as_posix())
    assert changing == {
        ("delete", "audit_records"): {"auth/audit/retention.py"},
        ("delete", "audit_checkpoints"): {"auth/audit/retention.py"},
        ("update", "audit_heads"): {"auth/audit/chain.py", "auth/audit/retention.py"},
    }


async def test_a_head_that_was_turned_back_cannot_overwrite_a_record(database: Database) -> None:
    log = AuditLog(database)
    await log.add("proj_1", "proj_2")
    async with database.writing() as connection:
        await connection.execute(audit_heads.update().values(sequence=1))
    with pytest.raises(Exception, match="audit_records"):
        await log.add("proj_3")
    assert [record.target_id for record in await read_chain(database)] == ["proj_1", "proj_2"]
