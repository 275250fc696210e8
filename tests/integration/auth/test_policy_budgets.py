"""Budgets: what they are of, what is spent of them, and the thresholds that are reached."""

from typing import Any

import pytest

from helixflow.auth.policy_tidying import EVENTS_KEPT_S, prune_policies
from helixflow.auth.thresholds import BudgetThresholds
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import Period, Scope, Unit
from helixflow.rpc.generated.auth_v1 import admin_pb2, metering_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_POLICIES
from helixflow.storage.engine import Database
from helixflow.storage.schema import budget_events, budgets
from tests.harness.auth import Installation, Person, refused
from tests.harness.ledger import NOW, make_row, ship

DAY_S = 86_400
NANOS = 10**9
# 2026-11-23 and 2026-11-01.
TODAY, THIS_MONTH, NEXT_MONTH = NOW // DAY_S * DAY_S, (NOW // DAY_S - 22) * DAY_S, (NOW // DAY_S + 8) * DAY_S
ORGANISATION: Any = Scope.ORGANISATION.value
MONEY, TOKENS = (unit.value for unit in Unit)
DAY, MONTH, TOTAL = (period.value for period in Period)


class Books(Installation):
    """An installation on the 23rd of a month, with a ledger."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, FakeClock(NOW))
        self.thresholds = self.metering.thresholds
        self._position = 0

    async def spend(self, organisation: str, dollars: float = 0.0, tokens: int = 0, **fields: Any) -> None:
        """One request, admitted now or as `fields` say."""
        self._position += 1
        fields = {"project_id": "proj_1", "key_id": "key_1", "admitted_at_ms": self.now * 1000, **fields}
        row = make_row(
            self._position,
            organisation_id=organisation,
            cost=round(dollars * NANOS),
            prompt_tokens=tokens,
            cached_tokens=0,
            completion_tokens=0,
            **fields,
        )
        await self.metering.ledger.ship_records(ship([(self._position, row)]))

    async def owner(self, **fields: Any) -> Person:
        return await self.add_person(await self.add_organisation(), roles={"": "owner"}, **fields)

    async def make(self, caller: Person, **fields: Any) -> pb.Budget:
        """A budget of $10 a month on the caller's organisation, or as `fields` say."""
        values = {"scope": ORGANISATION, "unit": MONEY, "period": MONTH, "cap": "10", **fields}
        made = await self.call(caller, "CreateBudget", pb.CreateBudgetRequest(**values))
        assert isinstance(made, pb.Budget)
        return made

    async def events(self, caller: Person, budget_id: str = "") -> list[tuple[int, str]]:
        """Threshold and what was spent, the first first."""
        answer = await self.call(caller, "ListBudgetEvents", pb.ListBudgetEventsRequest(budget_id=budget_id))
        return sorted((event.threshold, event.spent) for event in answer.events)


@pytest.fixture
async def books(database: Database) -> Any:
    installation = Books(database)
    yield installation
    await installation.close()


async def test_a_budget_is_made_read_changed_deleted_recorded_and_told(books: Books) -> None:
    ada = await books.owner()
    made = await books.make(ada, cap="0012.50")
    assert (made.scope, made.subject_id, made.unit, made.period) == (ORGANISATION, ada.organisation_id, MONEY, MONTH)
    assert (made.cap, made.spent, list(made.thresholds), made.imposed) == ("12.50", "0.00", [50, 80, 100], False)
    assert (made.period_start, made.period_end) == (THIS_MONTH, NEXT_MONTH)
    assert await books.call(ada, "GetBudget", admin_pb2.GetRequest(id=made.id)) == made
    change = pb.UpdateBudgetRequest(
        id=made.id, if_version=1, cap="0.000000001", thresholds=pb.Int32List(values=[1, 100])
    )
    changed = await books.call(ada, "UpdateBudget", change)
    assert (changed.cap, list(changed.thresholds), changed.version) == ("0.000000001", [1, 100], 2)
    (listed,) = (await books.call(ada, "ListBudgets", pb.ListPoliciesRequest())).budgets
    assert listed == changed
    await books.call(ada, "DeleteBudget", admin_pb2.DeleteRequest(id=made.id, if_version=2))
    assert await books.told() == [(CHANGE_KIND_POLICIES, ada.organisation_id, ada.organisation_id)] * 3
    records = await books.audited(ada.organisation_id, outcome="done")
    assert [row.action for row in records] == ["create_budget", "update_budget", "delete_budget"]
    assert '"cap":"12.50"' in records[0].after and '"period":"month"' in records[0].after


NO_BUDGETS: list[tuple[str, dict[str, Any]]] = [
    *(("cap", {"cap": cap}) for cap in ("", "0", "0.000", "-1", "+1", "1e3", "1E3", "0.0000000001", "1,5", "NaN")),
    *(("cap", {"cap": cap}) for cap in ("9000000.000000001", "99999999999", " 1", "1 ", "١", "0x10", "1.", ".5")),
    *(("cap", {"cap": cap, "unit": TOKENS}) for cap in ("", "0", "-1", "1.5", "1e3", "9000000000000001", "٣")),
    *(("thresholds", {"thresholds": found}) for found in ([0], [101], [50, 50], [80, 50], list(range(1, 12)))),
    ("scope", {"scope": Scope.INSTALLATION.value, "imposed": True}),
    ("scope", {"scope": Scope.USER.value, "subject_id": "user_1"}),
    ("scope", {"scope": 0}),
    ("unit", {"unit": 0}),
    ("unit", {"unit": 3}),
    ("period", {"period": 0}),
    ("period", {"period": 4}),
    ("subject_id", {"scope": Scope.PROJECT.value}),
]


async def test_what_is_no_budget_is_refused_by_its_field(books: Books) -> None:
    root = await books.owner(operator=True)
    for param, fields in NO_BUDGETS:
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await books.make(root, **fields)
    assert not await books.rows(budgets)


async def test_the_largest_caps_are_exact(books: Books) -> None:
    ada = await books.owner()
    assert (await books.make(ada, cap="9000000")).cap == "9000000.00"
    assert (await books.make(ada, cap="9000000000000000", unit=TOKENS)).cap == "9000000000000000"
    async with refused(ErrorKind.CONFLICT):
        await books.make(ada, cap="1")


async def test_what_is_spent_is_that_of_its_subject_unit_and_period(books: Books) -> None:
    ada = await books.owner()
    mine = ada.organisation_id
    project, other = await books.add_project(mine), await books.add_project(mine, "Other")
    key, _ = await books.add_key(mine, project)
    await books.spend(mine, 1.25, 100, project_id=project, key_id=key)
    await books.spend(mine, 0.5, 10, project_id=other)
    await books.spend(mine, 4, 1000, project_id=project, admitted_at_ms=(TODAY - DAY_S) * 1000)
    await books.spend(mine, 8, 10_000, project_id=project, admitted_at_ms=(THIS_MONTH - 1) * 1000)
    await books.spend("org_other", 64, 10**6, project_id=project, key_id=key)
    spent = {}
    for unit in (MONEY, TOKENS):
        for period in (DAY, MONTH, TOTAL):
            made = await books.make(ada, unit=unit, period=period, cap="9000")
            spent[unit, period] = made.spent
    assert spent == {
        (MONEY, DAY): "1.75",
        (MONEY, MONTH): "5.75",
        (MONEY, TOTAL): "13.75",
        (TOKENS, DAY): "110",
        (TOKENS, MONTH): "1110",
        (TOKENS, TOTAL): "11110",
    }
    for scope, subject in ((Scope.PROJECT, project), (Scope.PROJECT, other), (Scope.KEY, key)):
        await books.make(ada, scope=scope.value, subject_id=subject)
    listed = (await books.call(ada, "ListBudgets", pb.ListPoliciesRequest())).budgets
    assert {budget.subject_id: budget.spent for budget in listed if budget.scope != ORGANISATION} == {
        project: "5.25",
        other: "0.50",
        key: "1.25",
    }
    (total,) = (budget for budget in listed if budget.period == TOTAL and budget.unit == MONEY)
    assert (total.period_start, total.period_end) == (0, 0)
    (today,) = (budget for budget in listed if budget.period == DAY and budget.unit == MONEY)
    assert (today.period_start, today.period_end) == (TODAY, TODAY + DAY_S)


async def test_imposed_budgets_are_seen_and_not_changed(books: Books) -> None:
    ada, root = await books.owner(), await books.owner(operator=True)
    imposed = await books.make(root, imposed=True, organisation_id=ada.organisation_id)
    own = await books.make(ada)
    (seen, found) = (await books.call(ada, "ListBudgets", pb.ListPoliciesRequest())).budgets
    assert {seen.id, found.id} == {imposed.id, own.id}
    async with refused(ErrorKind.PERMISSION_DENIED):
        await books.call(ada, "UpdateBudget", pb.UpdateBudgetRequest(id=imposed.id, cap="100"))
    async with refused(ErrorKind.PERMISSION_DENIED):
        await books.call(root, "UpdateBudget", pb.UpdateBudgetRequest(id=own.id, cap="100"))
    assert (await books.call(root, "UpdateBudget", pb.UpdateBudgetRequest(id=imposed.id, cap="100"))).cap == "100.00"


async def test_each_threshold_is_told_once_a_period(books: Books) -> None:
    ada, eve = await books.owner(), await books.owner()
    budget = await books.make(ada)
    await books.spend(ada.organisation_id, 4.99)
    await books.thresholds.look()
    assert await books.events(ada) == []
    await books.spend(ada.organisation_id, 0.01)
    await books.thresholds.look()
    await books.thresholds.look()
    assert await books.events(ada) == [(50, "5.00")]
    await books.spend(ada.organisation_id, 6)
    await books.thresholds.look()
    assert await books.events(ada) == [(50, "5.00"), (80, "11.00"), (100, "11.00")]
    assert books.thresholds.raised == {50: 1, 80: 1, 100: 1}
    assert await books.events(ada, budget.id) == await books.events(ada)
    assert await books.events(eve) == []
    async with refused(ErrorKind.NOT_FOUND, "budget_id"):
        await books.events(eve, budget.id)
    books.clock.advance(NEXT_MONTH - NOW + DAY_S)
    ada = Person(ada.id, ada.email, ada.organisation_id, await books.sign_in(ada.id, ada.organisation_id))
    await books.spend(ada.organisation_id, 5)
    await books.thresholds.look()
    assert await books.events(ada) == [(50, "5.00"), (50, "5.00"), (80, "11.00"), (100, "11.00")]


async def test_what_comes_late_counts_for_the_period_that_it_was_admitted_in(books: Books) -> None:
    books.clock.advance(TODAY + DAY_S - NOW - 60)
    ada = await books.owner()
    await books.make(ada, period=DAY)
    books.clock.advance(120)
    await books.spend(ada.organisation_id, 5, admitted_at_ms=(TODAY + DAY_S - 30) * 1000)
    await books.thresholds.look()
    (event,) = await books.rows(budget_events)
    assert (event.threshold, event.period_start) == (50, TODAY)


async def test_new_and_changed_budgets_are_looked_at_without_new_spend(books: Books) -> None:
    ada = await books.owner()
    await books.spend(ada.organisation_id, 6)
    await books.thresholds.look()
    budget = await books.make(ada, thresholds=[50, 90])
    await books.thresholds.look()
    assert await books.events(ada) == [(50, "6.00")]
    books.clock.advance(3600)
    ada = Person(ada.id, ada.email, ada.organisation_id, await books.sign_in(ada.id, ada.organisation_id))
    await books.thresholds.look()
    await books.call(ada, "UpdateBudget", pb.UpdateBudgetRequest(id=budget.id, cap="6.5"))
    await books.thresholds.look()
    assert await books.events(ada) == [(50, "6.00"), (90, "6.00")]


async def test_a_larger_cap_lets_thresholds_be_reached_again(books: Books) -> None:
    ada = await books.owner()
    budget = await books.make(ada, period=TOTAL)
    await books.spend(ada.organisation_id, 10)
    await books.thresholds.look()
    await books.call(ada, "UpdateBudget", pb.UpdateBudgetRequest(id=budget.id, cap="20"))
    await books.thresholds.look()
    assert await books.events(ada) == [(50, "10.00")]
    await books.spend(ada.organisation_id, 10)
    await books.thresholds.look()
    assert await books.events(ada) == [(50, "10.00"), (80, "20.00"), (100, "20.00")]


async def test_two_control_processes_tell_it_once(books: Books) -> None:
    ada = await books.owner()
    await books.make(ada)
    other = BudgetThresholds(books.database, books.clock)
    await books.spend(ada.organisation_id, 10)
    for _ in range(2):
        await books.thresholds.look()
        await other.look()
    assert [threshold for threshold, _ in await books.events(ada)] == [50, 80, 100]
    assert (sum(books.thresholds.raised.values()), sum(other.raised.values())) == (3, 0)


async def test_nothing_is_lost_while_the_database_is_away(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = await books.owner()
    await books.make(ada)
    await books.thresholds.look()
    books.clock.advance(3600)
    await books.thresholds.look()
    await books.spend(ada.organisation_id, 5)
    with monkeypatch.context() as patch:
        patch.setattr(books.database, "reading", _away)
        async with refused(ErrorKind.UNAVAILABLE):
            await books.thresholds.look()
    await books.thresholds.look()
    assert len(await books.rows(budget_events)) == 1


def _away() -> Any:
    raise HelixError(ErrorKind.UNAVAILABLE, "away")


async def test_events_stay_after_their_budget_and_go_with_time(books: Books) -> None:
    ada = await books.owner()
    budget = await books.make(ada, cap="1")
    await books.spend(ada.organisation_id, 1)
    await books.thresholds.look()
    await books.call(ada, "DeleteBudget", admin_pb2.DeleteRequest(id=budget.id))
    assert len(await books.events(ada)) == 3
    await prune_policies(books.database, books.now)
    assert len(await books.rows(budget_events)) == 3
    await prune_policies(books.database, books.now + EVENTS_KEPT_S + 1)
    assert not await books.rows(budget_events)


async def test_a_budget_of_a_key_goes_on_when_it_is_rotated(books: Books) -> None:
    ada = await books.owner()
    mine = ada.organisation_id
    project = await books.add_project(mine)
    keys = [(await books.add_key(mine, project, owner_id=ada.id, scopes=["models:use"]))[0] for _ in range(2)]
    (first, other) = keys
    total = await books.make(ada, scope=Scope.KEY.value, subject_id=first, period=TOTAL, cap="3", thresholds=[100])
    apart = await books.make(ada, scope=Scope.KEY.value, subject_id=other, period=TOTAL, cap="3", thresholds=[100])
    await books.spend(mine, 1, project_id=project, key_id=first)
    rotated = await books.call(ada, "RotateKey", admin_pb2.RotateKeyRequest(id=first, overlap_s=3600))
    second = str(rotated.key.id)
    assert len(await books.rows(budgets)) == 2
    wanted = metering_pb2.ResolvePoliciesRequest(organisation_id=mine, key_id=second)
    (found,) = (await books.metering.ResolvePolicies(wanted, None)).budgets  # type: ignore[arg-type]
    assert (found.id, found.subject_id, found.cap) == (total.id, first, 3 * NANOS)
    later = await books.make(ada, scope=Scope.KEY.value, subject_id=second, period=TOTAL, cap="3", thresholds=[100])
    for key in (first, second, other):
        await books.spend(mine, 0.5, project_id=project, key_id=key)
    third = str((await books.call(ada, "RotateKey", admin_pb2.RotateKeyRequest(id=second))).key.id)
    await books.spend(mine, 1, project_id=project, key_id=third)
    listed = (await books.call(ada, "ListBudgets", pb.ListPoliciesRequest())).budgets
    assert {budget.id: budget.spent for budget in listed} == {total.id: "3.00", later.id: "1.50", apart.id: "0.50"}
    assert (await books.call(ada, "GetBudget", admin_pb2.GetRequest(id=total.id))).spent == "3.00"
    of_third = (await books.call(ada, "ListBudgets", pb.ListPoliciesRequest(subject_id=third))).budgets
    assert {budget.id for budget in of_third} == {total.id, later.id}
    await books.thresholds.look()
    assert await books.events(ada) == [(100, "3.00")]
    spend = [
        metering_pb2.SpendQuery(scope=Scope.KEY.value, subject_id=key, organisation_id=mine, unit=MONEY)  # type: ignore[arg-type]
        for key in (first, second, third, other)
    ]
    answer = await books.metering.ledger.read_spend(metering_pb2.ReadSpendRequest(queries=spend))
    assert list(answer.spent) == [3 * NANOS, 3 * NANOS // 2, NANOS, NANOS // 2]
