"""Journals of nodes that never come back: administrators of the installation see them and give them up."""

import pytest

from helixflow.core.errors import ErrorKind
from helixflow.metering.spend import ABANDONED
from helixflow.rpc.generated.auth_v1 import admin_pb2, metering_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from tests.harness.auth import Installation, Person, refused
from tests.harness.ledger import JOURNAL, NODE, OTHER_JOURNAL, ship

CLOSED = "c" * 24


@pytest.fixture
async def operator(auth: Installation) -> Person:
    """The ledger knows three journals: one that brings something, one that is announced, one that is closed."""
    ledger = auth.metering.ledger
    await ledger.ship_records(ship([], journal_id=JOURNAL, position=70))
    opened_at_ms = (auth.now + 5) * 1000
    for journal_id in (OTHER_JOURNAL, CLOSED):
        opening = metering_pb2.OpenJournalRequest(journal_id=journal_id, node_id=NODE, opened_at_ms=opened_at_ms)
        await ledger.open_journal(opening)
    await ledger.ship_records(ship([], journal_id=CLOSED, position=9, closes=True))
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"}, operator=True)


async def listed(auth: Installation, caller: Person, **request: object) -> pb.ListJournalsResponse:
    answer = await auth.call(caller, "ListJournals", pb.ListJournalsRequest(**request))  # type: ignore[arg-type]
    assert isinstance(answer, pb.ListJournalsResponse)
    return answer


async def close(auth: Installation, caller: Person, journal_id: str) -> pb.Journal:
    closed = await auth.call(caller, "CloseJournal", admin_pb2.GetRequest(id=journal_id))
    assert isinstance(closed, pb.Journal)
    return closed


async def test_open_journals_are_listed_the_oldest_first(auth: Installation, operator: Person) -> None:
    began = auth.now
    auth.clock.advance(100)
    first = await listed(auth, operator, page_size=1)
    rest = await listed(auth, operator, page_size=1, cursor=first.next_cursor)
    expected = pb.Journal(id=JOURNAL, node_id=NODE, opened_at=began, shipped_at=began, position=70, age_s=100)
    assert list(first.journals) == [expected]
    assert list(rest.journals) == [pb.Journal(id=OTHER_JOURNAL, node_id=NODE, opened_at=began + 5, age_s=95)]
    assert rest.next_cursor == ""


async def test_a_journal_is_given_up_and_stays_open_until_some_node_has_closed_it(
    auth: Installation, operator: Person
) -> None:
    async with refused(ErrorKind.CONFLICT):
        await close(auth, operator, JOURNAL)
    auth.clock.advance(60)
    for _ in range(2):
        assert (await close(auth, operator, JOURNAL)).node_id == ""
    (record,) = await auth.audited("", action="close_journal")
    assert (record.target_id, NODE in record.before, ABANDONED in record.after) == (JOURNAL, True, True)
    view = await auth.metering.ledger.read_spend(metering_pb2.ReadSpendRequest())
    assert {state.journal_id: state.node_id for state in view.open_journals} == {
        JOURNAL: ABANDONED,
        OTHER_JOURNAL: NODE,
    }
    # Its node is there after all.
    await auth.metering.ledger.ship_records(ship([], journal_id=JOURNAL, position=80))
    assert [journal.node_id for journal in (await listed(auth, operator)).journals] == [NODE, NODE]


async def test_only_open_journals_can_be_given_up(auth: Installation, operator: Person) -> None:
    async with refused(ErrorKind.CONFLICT):
        await close(auth, operator, CLOSED)
    async with refused(ErrorKind.NOT_FOUND, "id"):
        await close(auth, operator, "d" * 24)
