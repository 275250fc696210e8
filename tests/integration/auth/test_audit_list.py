"""What `ListAuditRecords` shows: the caller's organisation, newest first, filtered, in pages."""

import pytest
from sqlalchemy import select

from helixflow.auth.audit.chain import record_of
from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.caller import Caller, CallerKind
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.engine import Database
from helixflow.storage.schema import audit_records
from tests.harness.audit import ORGANISATION, AuditLog

BOB = Caller(CallerKind.KEY, "key_bob", "Bob", ORGANISATION)
OPERATOR = Caller(CallerKind.ACCOUNT, "user_op", "Op", ORGANISATION, operator=True)


@pytest.fixture
async def log(database: Database) -> AuditLog:
    log = AuditLog(database)
    await log.add("1", "2")
    log.clock.advance(100)
    await log.add("3", caller=BOB)
    await log.add("9", organisation_id="org_2")
    await log.add("8", organisation_id=INSTALLATION)
    return log


def targets(answer: pb.ListAuditRecordsResponse) -> list[str]:
    return [record.target_id for record in answer.records]


async def test_records_come_newest_first_and_only_of_the_own_organisation(log: AuditLog) -> None:
    assert targets(await log.list_records()) == ["3", "2", "1"]
    assert targets(await log.list_records(Caller(CallerKind.ACCOUNT, "x", organisation_id="org_2"))) == ["9"]


async def test_a_record_is_shown_as_it_is_stored(log: AuditLog) -> None:
    shown = (await log.list_records(page_size=1)).records[0]
    query = select(audit_records).where(
        audit_records.c.organisation_id == ORGANISATION, audit_records.c.sequence == shown.sequence
    )
    (row,) = await log.database.fetch_all(query)
    stored = record_of(row)
    assert {field.name for field, _ in shown.ListFields()} >= {"hash", "previous_hash", "after", "at", "sequence"}
    assert shown.hash.hex() == stored.hash
    assert shown.previous_hash.hex() == stored.previous_hash
    assert (shown.actor_kind, shown.actor_id, shown.actor_name) == ("key", "key_bob", "Bob")
    assert (shown.action, shown.outcome, shown.after) == ("create_project", "done", '{"name":"Förde"}')


async def test_pages_neither_repeat_nor_skip(log: AuditLog) -> None:
    first = await log.list_records(page_size=2)
    await log.add("4")
    second = await log.list_records(page_size=2, cursor=first.next_cursor)
    assert [*targets(first), *targets(second)] == ["3", "2", "1"]
    assert second.next_cursor == ""


async def test_filters_narrow_it_down(log: AuditLog) -> None:
    begun = log.now - 100
    for filters, expected in (
        ({"actor_id": "key_bob"}, ["3"]),
        ({"target_id": "2"}, ["2"]),
        ({"action": "create_project", "outcome": "done"}, ["3", "2", "1"]),
        ({"outcome": "denied"}, []),
        ({"since": begun + 1}, ["3"]),
        ({"until": begun + 1}, ["2", "1"]),
        ({"since": begun, "until": begun + 1, "actor_id": "user_alice"}, ["2", "1"]),
        ({"actor_id": "' OR 1=1 --"}, []),
    ):
        assert targets(await log.list_records(**filters)) == expected, filters


async def test_only_operators_see_the_records_of_the_installation(log: AuditLog) -> None:
    with pytest.raises(HelixError) as refused:
        await log.list_records(installation=True)
    assert refused.value.kind is ErrorKind.PERMISSION_DENIED
    assert targets(await log.list_records(OPERATOR, installation=True)) == ["8"]


async def test_a_filter_that_no_text_can_match_is_refused(log: AuditLog) -> None:
    with pytest.raises(HelixError) as refused:
        await log.list_records(target_id="a\0b")
    assert (refused.value.kind, refused.value.param) == (ErrorKind.UNPROCESSABLE, "target_id")
