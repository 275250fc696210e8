"""What budgets have spent: one consistent view of sums and open journals, out of few rows of an index."""

from typing import Any

import pytest
from sqlalchemy import text

from helixflow.auth.ledger.ledger import Ledger
from helixflow.auth.ledger.spend import MAX_QUERIES, spend_query
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import DAY_MS, Period, period_bounds
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.storage.engine import Database
from tests.harness.auth import Installation
from tests.harness.ledger import JOURNAL, NODE, NOW, NOW_MS, OTHER_JOURNAL, make_row, ship

TODAY = NOW_MS // DAY_MS


def query(**changes: Any) -> pb.SpendQuery:
    """Money of an organisation, ever."""
    values: dict[str, Any] = {
        "scope": pb.SCOPE_ORGANISATION,
        "subject_id": "org_1",
        "organisation_id": "org_1",
        "unit": pb.BUDGET_UNIT_MONEY,
    }
    return pb.SpendQuery(**{**values, **changes})


async def test_spend_is_of_the_subject_and_period_and_in_the_order_asked_for(database: Database) -> None:
    ledger = Ledger(database, FakeClock(float(NOW)))
    auth = Installation(database)
    organisation = await auth.add_organisation()
    key, _ = await auth.add_key(organisation, await auth.add_project(organisation))
    rows = [
        make_row(1),
        make_row(2, project_id="proj_2", cost=100),
        make_row(3, organisation_id="org_2", cost=1000),
        make_row(4, admitted_at_ms=NOW_MS - 20 * DAY_MS, cost=10_000),
        make_row(5, admitted_at_ms=NOW_MS - 40 * DAY_MS, cost=2**53, key_id=key),
    ]
    await ledger.ship_records(ship(list(enumerate(rows, 1)), position=77))
    await ledger.ship_records(ship([], journal_id=OTHER_JOURNAL, position=5, closes=True))
    (day_from, day_to), (month_from, month_to) = (period_bounds(period, TODAY) for period in (Period.DAY, Period.MONTH))
    answer = await ledger.read_spend(
        pb.ReadSpendRequest(
            queries=[
                query(),
                query(from_ms=month_from, to_ms=month_to),
                query(from_ms=day_from, to_ms=day_to),
                query(from_ms=day_from, to_ms=day_to, unit=pb.BUDGET_UNIT_TOKENS),
                query(scope=pb.SCOPE_PROJECT, subject_id="proj_2"),
                query(scope=pb.SCOPE_KEY, subject_id=key),
                query(scope=pb.SCOPE_KEY, subject_id=key, organisation_id="org_2"),
                query(scope=pb.SCOPE_INSTALLATION, subject_id="", organisation_id="", from_ms=day_from, to_ms=day_to),
            ]
        )
    )
    assert list(answer.spent) == [2**53 + 10_111, 10_111, 111, 20, 100, 2**53, 0, 1111]
    (journal,) = answer.open_journals
    assert (journal.journal_id, journal.node_id, journal.position) == (JOURNAL, NODE, 77)


async def test_all_is_of_one_moment(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shipped while it is read is either in the sums and the position, or in neither."""
    ledger = Ledger(database, FakeClock(float(NOW)))
    await ledger.ship_records(ship([(1, make_row(1))]))
    from helixflow.auth.ledger import ledger as module

    read_sums = module.read_sums

    async def meanwhile(connection: Any, asked: Any) -> list[int]:
        await ledger.ship_records(ship([(1, make_row(1)), (2, make_row(2))]))
        return await read_sums(connection, asked)

    monkeypatch.setattr(module, "read_sums", meanwhile)
    answer = await ledger.read_spend(pb.ReadSpendRequest(queries=[query()]))
    assert (list(answer.spent), answer.open_journals[0].position) == ([11], 1)
    monkeypatch.undo()
    answer = await ledger.read_spend(pb.ReadSpendRequest(queries=[query()]))
    assert (list(answer.spent), answer.open_journals[0].position) == ([22], 2)


async def test_a_question_reads_a_range_of_the_primary_key(database: Database) -> None:
    bounds = {"from_ms": (TODAY - 30) * DAY_MS, "to_ms": TODAY * DAY_MS}
    for scope, subject in ((pb.SCOPE_ORGANISATION, "org_1"), (pb.SCOPE_PROJECT, "p"), (pb.SCOPE_KEY, "k")):
        async with database.reading() as connection:
            on_sqlite = connection.dialect.name == "sqlite"
            statement = spend_query([query(scope=scope, subject_id=subject, **bounds)])
            compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
            if not on_sqlite:
                await connection.execute(text("SET LOCAL enable_seqscan = off"))
            prefix = "EXPLAIN QUERY PLAN" if on_sqlite else "EXPLAIN"
            plan = str((await connection.execute(text(f"{prefix} {compiled}"))).all())
        if on_sqlite:
            assert "SEARCH usage_daily USING PRIMARY KEY (organisation_id=? AND start>? AND start<?)" in plan
        else:
            assert "pk_usage_daily" in plan
            assert "organisation_id" in plan
            assert "start >=" in plan


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scope": pb.SCOPE_UNSPECIFIED}, "scope"),
        ({"scope": pb.SCOPE_USER}, "scope"),
        ({"subject_id": ""}, "subject_id"),
        ({"organisation_id": ""}, "organisation_id"),
        ({"unit": pb.BUDGET_UNIT_UNSPECIFIED}, "unit"),
        ({"from_ms": 1, "to_ms": DAY_MS}, "from_ms"),
        ({"from_ms": DAY_MS, "to_ms": DAY_MS + 1000}, "to_ms"),
        ({"from_ms": DAY_MS, "to_ms": DAY_MS}, "to_ms"),
        ({"from_ms": DAY_MS, "to_ms": 0}, "to_ms"),
        ({"from_ms": -DAY_MS, "to_ms": DAY_MS}, "to_ms"),
    ],
)
async def test_what_is_no_question_is_refused_by_its_field(
    database: Database, changes: dict[str, Any], field: str
) -> None:
    ledger = Ledger(database, FakeClock())
    with pytest.raises(HelixError) as caught:
        await ledger.read_spend(pb.ReadSpendRequest(queries=[query(), query(**changes)]))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_VALUE, f"queries[1].{field}")


async def test_questions_are_bounded(database: Database) -> None:
    with pytest.raises(HelixError) as caught:
        await Ledger(database, FakeClock()).read_spend(pb.ReadSpendRequest(queries=[query()] * (MAX_QUERIES + 1)))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_VALUE, "queries")
