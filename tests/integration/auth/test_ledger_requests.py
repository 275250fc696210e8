"""`ListRequests` and `DescribeRequest`: single requests, for those who may see them."""

import re
from typing import Any

import pytest

from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind
from helixflow.metering.rows import RequestRow
from helixflow.rpc.generated.auth_v1 import admin_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.engine import Database
from tests.harness.auth import Installation, Person, refused
from tests.harness.ledger import NOW, NOW_MS, make_row, ship
from tests.harness.query_plans import explain

DAY = 86_400


class Requests:
    """Two projects of Acme, one of another organisation; `sam` sees the first one only."""

    def __init__(self, auth: Installation) -> None:
        self.auth = auth
        self.shipped = 0

    async def open(self) -> "Requests":
        auth = self.auth
        self.acme, self.other = await auth.add_organisation(), await auth.add_organisation("Other")
        self.one, self.two = await auth.add_project(self.acme, "One"), await auth.add_project(self.acme, "Two")
        self.theirs = await auth.add_project(self.other)
        self.ada = await auth.add_person(self.acme, roles={"": "viewer"})
        self.sam = await auth.add_person(self.acme, roles={self.one: "viewer"})
        self.olga = await auth.add_person(self.other, roles={"": "owner"})
        return self

    async def add(self, number: int, **changes: Any) -> RequestRow:
        row = make_row(number, **{"organisation_id": self.acme, "project_id": self.one, **changes})
        self.shipped += 1
        await self.auth.metering.ledger.ship_records(ship([(self.shipped, row)]))
        return row

    async def list(self, person: Person | None = None, **fields: Any) -> pb.ListRequestsResponse:
        request = pb.ListRequestsRequest(**fields)
        answer: pb.ListRequestsResponse = await self.auth.call(person or self.ada, "ListRequests", request)
        return answer

    async def describe(self, name: str, person: Person | None = None) -> pb.RequestDetails:
        request = admin_pb2.GetRequest(id=name)
        answer: pb.RequestDetails = await self.auth.call(person or self.ada, "DescribeRequest", request)
        return answer


@pytest.fixture
async def ledger(database: Database) -> Any:
    auth = Installation(database, FakeClock(float(NOW)))
    yield await Requests(auth).open()
    await auth.close()


def ids(answer: pb.ListRequestsResponse) -> list[str]:
    return [request.request_id for request in answer.requests]


async def test_a_request_is_shown_as_it_was_shipped(ledger: Requests) -> None:
    row = await ledger.add(
        1,
        user_id="user_1",
        tags={"team": "Ä"},
        outcome="interrupted",
        status=499,
        error="client_closed_request",
        estimated=True,
        queue_ms=-1,
        cost=1_234_567_890,
        explanation='{"authorised_by":"key"}',
    )
    shown = await ledger.describe(row.call_id)
    for field in pb.RequestDetails.DESCRIPTOR.fields:
        if field.name not in ("cost", "tags"):
            assert getattr(shown, field.name) == getattr(row, field.name), field.name
    assert (shown.cost, dict(shown.tags)) == ("1.23456789", {"team": "Ä"})
    assert (await ledger.describe(row.request_id)) == shown == (await ledger.list()).requests[0]


async def test_they_come_newest_first_in_pages_and_filtered(ledger: Requests) -> None:
    for number in range(5):
        await ledger.add(number, admitted_at_ms=NOW_MS - 1000 * (number // 2), key_id=f"key_{number % 2}")
    await ledger.add(7, project_id=ledger.two, key_id="", model="other", outcome="failed", admitted_at_ms=NOW_MS - 5000)
    first = await ledger.list(page_size=4)
    second = await ledger.list(page_size=4, cursor=first.next_cursor)
    assert [*ids(first), *ids(second)] == ["req_1", "req_0", "req_3", "req_2", "req_4", "req_7"]
    assert second.next_cursor == ""
    assert ids(await ledger.list(key_id="key_1")) == ["req_1", "req_3"]
    assert ids(await ledger.list(model="other")) == ids(await ledger.list(outcome="failed")) == ["req_7"]
    assert ids(await ledger.list(project_id=ledger.two)) == ["req_7"]
    assert ids(await ledger.list(**{"from": NOW - 2, "to": NOW - 1})) == ["req_4"]


async def test_what_is_asked_for_is_bounded(ledger: Requests) -> None:
    await ledger.add(1, admitted_at_ms=NOW_MS - 40 * DAY * 1000)
    assert ids(await ledger.list()) == [], "the last 30 days"
    assert ids(await ledger.list(to=NOW - 35 * DAY)) == ["req_1"]
    for param, fields in [
        ("from", {"from": NOW - 32 * DAY}),
        ("from", {"from": NOW, "to": NOW}),
        ("outcome", {"outcome": "Completed"}),
        ("limit", {"page_size": 101}),
        ("cursor", {"cursor": "x"}),
    ]:
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await ledger.list(**fields)


async def test_of_several_with_one_request_id_the_newest_is_meant(ledger: Requests) -> None:
    older = await ledger.add(1, request_id="mine", admitted_at_ms=NOW_MS - 9000)
    newer = await ledger.add(2, request_id="mine", project_id=ledger.two, admitted_at_ms=NOW_MS - 8000)
    await ledger.add(3, request_id="mine", organisation_id=ledger.other, project_id=ledger.theirs)
    assert (await ledger.describe("mine")).call_id == newer.call_id
    assert (await ledger.describe("mine", ledger.sam)).call_id == older.call_id, "that may be seen"
    # Who calls a request as another one's call id does not stand before it.
    await ledger.add(4, request_id=older.call_id)
    assert (await ledger.describe(older.call_id)).request_id == "mine"


async def test_one_is_found_by_the_index_of_its_name(ledger: Requests, database: Database) -> None:
    """Not among all of its organisation, which are in the order of time already."""
    await ledger.add(1, request_id="theirs", project_id=ledger.two)
    plans = await explain(database, lambda: ledger.describe("theirs"))
    plans += await explain(database, lambda: ledger.describe(make_row(1).call_id))
    found = [plan for statement, plan in plans if "requests" in statement]
    assert len(found) == 3
    for plan in found:
        assert re.search(r"\((call_id|request_id) ?=", plan), plan
        assert not re.search(r"\(organisation_id ?=", plan), plan


async def test_only_what_may_be_seen_is_there(ledger: Requests) -> None:
    one = await ledger.add(1)
    two = await ledger.add(2, project_id=ledger.two)
    theirs = await ledger.add(3, organisation_id=ledger.other, project_id=ledger.theirs)
    assert ids(await ledger.list(ledger.sam)) == [one.request_id]
    assert ids(await ledger.list(ledger.olga)) == [theirs.request_id]
    async with refused(ErrorKind.PERMISSION_DENIED):
        await ledger.list(ledger.sam, project_id=ledger.two)
    async with refused(ErrorKind.NOT_FOUND, "project_id"):
        await ledger.list(ledger.ada, project_id=ledger.theirs)
    for name, person in [
        (theirs.call_id, ledger.ada),
        (theirs.request_id, ledger.ada),
        (two.call_id, ledger.sam),
        (one.call_id, ledger.olga),
        ("nothing", ledger.ada),
    ]:
        async with refused(ErrorKind.NOT_FOUND, "id"):
            await ledger.describe(name, person)
