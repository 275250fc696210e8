"""From the database to a file that is verified without it, and what was tampered with in between."""

import asyncio
import io
import json
import time
from typing import Any

import pytest
from msgspec.structs import asdict, replace
from sqlalchemy import delete, insert, select, update

from helixflow.auth.audit.chain import append, record_of
from helixflow.auth.audit.entry import INSTALLATION, AuditEntry
from helixflow.auth.audit.export import BATCH
from helixflow.auth.audit.record import hash_of
from helixflow.auth.audit.signatures import parse_public_keys
from helixflow.auth.audit.verify import Broken, Verified, verify
from helixflow.auth.caller import Caller, CallerKind
from helixflow.core.errors import ErrorKind
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.engine import Database
from helixflow.storage.schema import audit_checkpoints, audit_heads, audit_records, signing_keys
from tests.harness.audit import ALICE, ORGANISATION, AuditLog, build_records
from tests.harness.auth import Installation, refused

OPERATOR = Caller(CallerKind.ACCOUNT, "user_op", "Op", ORGANISATION, operator=True)


def check(lines: list[bytes]) -> Verified:
    return verify(io.BytesIO(b"".join(lines)))


def refuse(lines: list[bytes]) -> Broken:
    with pytest.raises(Broken) as caught:
        check(lines)
    return caught.value


def of_type(lines: list[bytes], kind: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, lines) if line["type"] == kind]


async def change(database: Database, statement: Any) -> None:
    async with database.writing() as connection:
        await connection.execute(statement)


def row(sequence: int) -> Any:
    return (audit_records.c.organisation_id == ORGANISATION) & (audit_records.c.sequence == sequence)


@pytest.fixture
async def log(database: Database) -> AuditLog:
    """Ten records, with checkpoints after the fourth and the tenth."""
    log = AuditLog(database)
    await log.add("1", "2", "3", "4")
    await log.checkpoints.sign_due(log.now)
    log.clock.advance(1000)
    await log.add("5", "6", "7", "8", "9", "10")
    await log.checkpoints.sign_due(log.now)
    return log


async def test_an_export_verifies_and_holds_its_own_record(log: AuditLog) -> None:
    lines = await log.export()
    verified = check(lines)
    assert (verified.organisation_id, verified.first, verified.last) == (ORGANISATION, 1, 11)
    # After 4, 10, and the export's own.
    assert [checkpoint["sequence"] for checkpoint in of_type(lines, "checkpoint")] == [4, 10, 11]
    own = of_type(lines, "record")[-1]
    assert (own["action"], own["actor_id"], own["after"]) == ("export_audit_log", "user_alice", '{"since":0,"until":0}')
    assert b"private" not in b"".join(lines).lower()


async def test_every_message_holds_whole_lines(database: Database) -> None:
    log = AuditLog(database)
    rows = [AuditEntry(ORGANISATION, ALICE, "a", "k", "t", None, {"name": ["ö" * 900] * 8}) for _ in range(250)]
    async with database.writing() as connection:
        await append(connection, rows, log.now)
    messages = await log.export_messages()
    assert len(messages) > 10
    assert all(message.endswith(b"\n") and len(message) < 2**20 for message in messages)
    assert verify(io.BytesIO(b"".join(messages))).records == 251


@pytest.mark.parametrize("count", [BATCH - 1, BATCH, BATCH + 1])
async def test_batches_lose_nothing_at_their_edges(database: Database, count: int) -> None:
    log = AuditLog(database)
    # The export adds its own record.
    await log.add(*map(str, range(1, count)))
    await log.checkpoints.sign_due(log.now)
    verified = check(await log.export())
    assert (verified.records, verified.checkpoints) == (count, 2)


async def test_an_empty_chain_can_be_exported(database: Database) -> None:
    log = AuditLog(database)
    verified = check(await log.export())
    assert (verified.first, verified.last) == (1, 1)


async def test_a_range_is_a_part_that_verifies(log: AuditLog) -> None:
    later = log.now
    lines = await log.export(since=later)
    assert [record["target_id"] for record in of_type(lines, "record")] == ["5", "6", "7", "8", "9", "10", ORGANISATION]
    # The checkpoint before the first record vouches for the beginning.
    assert [checkpoint["sequence"] for checkpoint in of_type(lines, "checkpoint")] == [4, 10, 11]
    assert (check(lines).first, check(lines).last) == (5, 11)
    lines = await log.export(until=later)
    assert [record["target_id"] for record in of_type(lines, "record")] == ["1", "2", "3", "4"]
    assert check(lines).last == 4
    log.clock.advance(10)
    assert [record["sequence"] for record in of_type(await log.export(since=later, until=later + 1), "record")] == [
        *range(5, 13)
    ]


async def test_a_range_without_records_verifies(log: AuditLog) -> None:
    assert check(await log.export(since=2**40)).records == 0
    assert check(await log.export(until=5)).records == 0
    assert check(await log.export(since=5, until=6)).records == 0


async def test_clocks_may_jump_but_no_record_is_left_out(database: Database) -> None:
    log = AuditLog(database)
    begun = log.now
    for target, second in (("1", 100), ("2", 300), ("3", 200), ("4", 400)):
        async with database.writing() as connection:
            await append(connection, [AuditEntry(ORGANISATION, ALICE, "a", "", target)], begun + second)
    lines = await log.export(since=begun + 250, until=begun + 410)
    assert [record["target_id"] for record in of_type(lines, "record")] == ["2", "3", "4"]
    assert check(lines).records == 3


async def test_only_operators_export_the_installation(log: AuditLog) -> None:
    await log.add("x", organisation_id=INSTALLATION)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await log.export(installation=True)
    lines = await log.export(OPERATOR, installation=True)
    assert check(lines).organisation_id == INSTALLATION
    assert [record["actor_id"] for record in of_type(lines, "record")] == ["user_alice", "user_op"]


async def test_a_refused_export_is_recorded(auth: Installation) -> None:
    """By the dispatcher: the refusal comes after the caller was let in, while the stream begins."""
    acme = await auth.add_organisation()
    ada = await auth.add_person(acme, roles={"": "owner"})
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(ada, "ExportAuditLog", pb.ExportAuditLogRequest(installation=True))
    (record,) = await auth.audited(acme)
    assert (record.action, record.outcome, record.reason) == ("export_audit_log", "denied", "permission_denied")
    assert (record.target_kind, record.actor_id) == ("audit_log", ada.id)


async def test_others_may_write_while_a_slow_reader_takes_its_time(log: AuditLog) -> None:
    await log.add(*map(str, range(3 * BATCH)))
    messages = []
    async for message in log.stream_export():
        messages.append(message)
        await log.add("meanwhile")
        log.clock.advance(700)
        await log.checkpoints.sign_due(log.now)
    assert verify(io.BytesIO(b"".join(messages))).last == 10 + 3 * BATCH + 1


@pytest.mark.parametrize("column", ["actor_id", "after", "at", "outcome", "address"])
async def test_a_field_changed_in_the_database_is_found(log: AuditLog, column: str) -> None:
    value = 5 if column == "at" else "changed"
    await change(log.database, update(audit_records).where(row(6)).values({column: value}))
    broken = refuse(await log.export())
    assert broken.sequence == 6
    assert "a field was changed" in broken.problem


async def test_a_record_changed_and_hashed_anew_is_found(log: AuditLog) -> None:
    (stored,) = await log.database.fetch_all(select(audit_records).where(row(6)))
    forged = hash_of(replace(record_of(stored), actor_id="user_malory"))
    await change(log.database, update(audit_records).where(row(6)).values(actor_id="user_malory", hash=forged))
    broken = refuse(await log.export())
    assert broken.sequence == 7
    assert "record 6 or this one was changed" in broken.problem


async def test_a_chain_hashed_anew_from_one_record_on_is_found_by_the_next_checkpoint(log: AuditLog) -> None:
    forged = build_records(5, actor_id="user_malory")
    values: Any = [
        {
            **asdict(record),
            "previous_hash": bytes.fromhex(record.previous_hash),
            "hash": bytes.fromhex(record.hash),
        }
        for record in forged
    ]
    async with log.database.writing() as connection:
        await connection.execute(delete(audit_records).where(audit_records.c.sequence <= 5))
        await connection.execute(insert(audit_records), values)
    broken = refuse(await log.export())
    assert broken.sequence == 4
    assert "a checkpoint was signed for" in broken.problem


async def test_a_record_deleted_in_the_database_is_found(log: AuditLog) -> None:
    await change(log.database, delete(audit_records).where(row(6)))
    broken = refuse(await log.export())
    assert (broken.sequence, broken.problem) == (6, "missing: 6; record 7 follows instead")


async def test_an_end_cut_off_in_the_database_is_found_by_its_checkpoint(log: AuditLog) -> None:
    kept = (await log.database.fetch_all(select(audit_records.c.hash).where(row(7))))[0].hash
    async with log.database.writing() as connection:
        await connection.execute(delete(audit_records).where(audit_records.c.sequence > 7))
        await connection.execute(update(audit_heads).values(sequence=7, hash=kept))
    broken = refuse(await log.export())
    # The export itself became the eighth record.
    assert (broken.sequence, broken.problem) == (9, "missing: a checkpoint is signed for record 10")


async def test_a_checkpoint_changed_in_the_database_is_found(log: AuditLog) -> None:
    await change(log.database, update(audit_checkpoints).where(audit_checkpoints.c.sequence == 4).values(at=5))
    assert "the signature does not match" in refuse(await log.export()).problem


async def test_signatures_of_a_retired_key_go_on_to_verify(log: AuditLog) -> None:
    await change(log.database, update(signing_keys).values(private_key=None))
    log.clock.advance(1)
    lines = await log.export()
    keys = of_type(lines, "header")[0]["keys"]
    assert check(lines).kids == set(keys)
    assert len(keys) == 2
    old, new = (parse_public_keys(pem.encode()) for pem in keys.values())
    assert verify(io.BytesIO(b"".join(lines)), old | new).last == 11
    with pytest.raises(Broken, match="unknown key"):
        verify(io.BytesIO(b"".join(lines)), old if len(old) else new)


async def test_ten_thousand_records_verify_in_reasonable_time(database: Database) -> None:
    log = AuditLog(database)
    entries = [AuditEntry(ORGANISATION, ALICE, "a", "k", str(n), {"name": "a"}, {"name": "b"}) for n in range(10_000)]
    async with database.writing() as connection:
        await append(connection, entries, log.now)
    lines = await log.export()
    begun = time.perf_counter()
    assert (await asyncio.to_thread(check, lines)).records == 10_001
    assert time.perf_counter() - begun < 60
