"""`QueryUsage`: roll-ups by groups are what the rows add up to, in pages, for those who may see them."""

import random
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind
from helixflow.metering.money import format_dollars, parse_dollars
from helixflow.metering.rows import RequestRow
from helixflow.rpc.generated.auth_v1 import admin_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.engine import Database
from tests.harness.auth import Installation, Person, refused
from tests.harness.ledger import NOW, make_row, ship
from tests.harness.query_plans import explain

HOUR, DAY = 3600, 86_400
TODAY = NOW - NOW % DAY
YEAR_AGO = TODAY - 365 * DAY
COLUMNS = {
    "key": "key_id",
    "project": "project_id",
    "user": "user_id",
    "model": "model",
    "deployment": "deployment",
    "operation": "operation",
}
GROUPS = [*COLUMNS, "hour", "day", "month", "tag:team", "tag:job"]


@dataclass(repr=False)
class Ledgered:
    """An organisation with a year of requests; `sam` sees one project only, `olga` is of another organisation."""

    auth: Installation
    rows: list[RequestRow]
    projects: tuple[str, str]
    ada: Person
    sam: Person
    olga: Person
    other_project: str

    async def ask(self, person: Person | None = None, **fields: Any) -> pb.QueryUsageResponse:
        request = pb.QueryUsageRequest(**fields)
        answer: pb.QueryUsageResponse = await self.auth.call(person or self.ada, "QueryUsage", request)
        return answer

    async def plans(self, database: Database, *questions: dict[str, Any]) -> list[tuple[str, str]]:
        """The statements that questions make of roll-ups, with their plans."""

        async def ask_all() -> None:
            for question in questions:
                await self.ask(**question)

        found = await explain(database, ask_all)
        assert not [statement for statement, _ in found if re.search(r"\b(FROM|JOIN) requests\b", statement)]
        return [(statement, plan) for statement, plan in found if "usage_" in statement]

    async def pages(self, **fields: Any) -> list[pb.UsageRow]:
        rows: list[pb.UsageRow] = []
        cursor = ""
        while True:
            answer = await self.ask(**fields, cursor=cursor)
            rows += answer.rows
            cursor = answer.next_cursor
            if not cursor:
                return rows


@pytest.fixture
async def ledgered(database: Database) -> AsyncIterator[Ledgered]:
    auth = Installation(database, FakeClock(float(NOW)))
    acme, other = await auth.add_organisation(), await auth.add_organisation("Other")
    projects = (await auth.add_project(acme, "One"), await auth.add_project(acme, "Two"))
    other_project = await auth.add_project(other)
    dice = random.Random(4)
    rows = [_row(dice, number, acme, projects) for number in range(240)]
    foreign = [_row(dice, 1000 + number, other, (other_project,)) for number in range(20)]
    position = 0
    for part in (rows[:100], rows[100:], foreign):
        await auth.metering.ledger.ship_records(ship([(position + n + 1, row) for n, row in enumerate(part)]))
        position += len(part)
    ada = await auth.add_person(acme, roles={"": "billing"})
    sam = await auth.add_person(acme, roles={projects[0]: "developer"})
    olga = await auth.add_person(other, roles={"": "owner"})
    yield Ledgered(auth, rows, projects, ada, sam, olga, other_project)
    await auth.close()


def _row(dice: random.Random, number: int, organisation_id: str, projects: Sequence[str]) -> RequestRow:
    tags = {name: dice.choice(["a", "b", "Ä,\n="]) for name in ("team", "job") if dice.random() < 0.5}
    # Half of them of the last three days, so that hours matter.
    since = dice.choice([YEAR_AGO, TODAY - 3 * DAY])
    model = dice.choice(["small", "large", "Größe"])
    return make_row(
        number,
        admitted_at_ms=dice.randrange(since * 1000, NOW * 1000),
        organisation_id=organisation_id,
        project_id=dice.choice(projects),
        key_id=dice.choice(["key_1", "key_2", ""]),
        user_id=dice.choice(["user_1", ""]),
        model=model,
        deployment=f"{model}/llama_cpp-{dice.randrange(2)}",
        operation=dice.choice(["chat/completions", "completions", "embeddings"]),
        outcome=dice.choice(["completed", "completed", "failed", "cancelled"]),
        prompt_tokens=dice.randrange(2**40),
        cached_tokens=dice.randrange(10),
        completion_tokens=dice.randrange(1000),
        reasoning_tokens=dice.randrange(10),
        cost=dice.randrange(10**12),
        tags=tags,
    )


def expected(rows: Sequence[RequestRow], groups: Sequence[str], start: int, end: int, tag: str = "") -> dict[Any, Any]:
    """What the rows add up to, by group."""
    sums: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * 7)
    for row in rows:
        tags = msgspec.json.decode(row.tags) if row.tags else {}
        if not start * 1000 <= row.admitted_at_ms < end * 1000:
            continue
        if any(name.startswith("tag:") and name[4:] not in tags for name in groups):
            continue
        if tag and tags.get(tag.partition("=")[0]) != tag.partition("=")[2]:
            continue
        figures = (1, int(row.outcome == "failed"), row.prompt_tokens, row.cached_tokens, row.completion_tokens,
                   row.reasoning_tokens, row.cost)  # fmt: skip
        group = tuple(_value(row, name, tags) for name in groups)
        sums[group] = [a + b for a, b in zip(sums[group], figures, strict=True)]
    return dict(sums)


def _value(row: RequestRow, name: str, tags: dict[str, str]) -> str:
    if name.startswith("tag:"):
        return tags[name[4:]]
    if name in COLUMNS:
        return str(getattr(row, COLUMNS[name]))
    moment = datetime.fromtimestamp(row.admitted_at_ms // 1000, UTC).replace(minute=0, second=0)
    if name != "hour":
        moment = moment.replace(hour=0)
    if name == "month":
        moment = moment.replace(day=1)
    return str(int(moment.timestamp()))


def figures_of(row: pb.UsageRow) -> list[int]:
    return [row.requests, row.failed_requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens,
            row.reasoning_tokens, parse_dollars(row.cost)]  # fmt: skip


def add(figures: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*figures, strict=True)] if figures else [0] * 7


questions = st.fixed_dictionaries(
    {
        "group_by": st.lists(st.sampled_from(GROUPS), unique=True, max_size=3).filter(
            lambda groups: (
                sum(name.startswith("tag:") for name in groups) <= 1
                and not ("hour" in groups and any(name.startswith("tag:") for name in groups))
            )
        ),
        "page_size": st.sampled_from([13, 1000]),
    }
)


@given(question=questions, days=st.sampled_from([1, 3, 30, 365]), skewed=st.booleans())
@settings(
    max_examples=25, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
async def test_every_grouping_is_what_the_rows_add_up_to(
    ledgered: Ledgered, question: dict[str, Any], days: int, skewed: bool
) -> None:
    if "hour" in question["group_by"]:
        days = min(days, 30)
    start, end = TODAY + DAY - days * DAY - skewed * 1234, TODAY + DAY - skewed * 4321
    answer = await ledgered.ask(**question, **{"from": start, "to": end})
    begin, finish = getattr(answer, "from"), answer.to
    assert begin <= start < end <= finish
    wanted = expected(ledgered.rows, question["group_by"], begin, finish)
    if not question["group_by"]:
        wanted = {(): wanted.get((), [0] * 7)}
    rows = await ledgered.pages(**question, **{"from": start, "to": end})
    assert len(rows) == len(wanted), "no group comes twice"
    assert {tuple(row.group): figures_of(row) for row in rows} == wanted
    assert figures_of(answer.total) == add(list(wanted.values()))
    if len(rows) <= question["page_size"]:
        assert answer.next_cursor == ""


async def test_filters_narrow_what_is_added_up(ledgered: Ledgered) -> None:
    span = {"from": YEAR_AGO + HOUR, "to": TODAY + 5 * HOUR}
    for filters, keep in [
        ({"key_ids": ["key_1", "key_2"]}, lambda row: row.key_id in ("key_1", "key_2")),
        ({"user_ids": ["user_1"]}, lambda row: row.user_id == "user_1"),
        ({"models": ["Größe"]}, lambda row: row.model == "Größe"),
        ({"project_ids": [ledgered.projects[1]]}, lambda row: row.project_id == ledgered.projects[1]),
        ({"models": ["none"]}, lambda row: False),
        ({"operations": ["embeddings", "completions"]}, lambda row: row.operation in ("embeddings", "completions")),
    ]:
        answer = await ledgered.ask(group_by=["model"], **filters, **span)
        wanted = expected([row for row in ledgered.rows if keep(row)], ["model"], YEAR_AGO + HOUR, TODAY + 5 * HOUR)
        assert {tuple(row.group): figures_of(row) for row in answer.rows} == wanted
    span = {"from": YEAR_AGO, "to": TODAY + DAY}
    answer = await ledgered.ask(group_by=["tag:team", "month"], tag="team=Ä,\n=", **span)
    wanted = expected(ledgered.rows, ["tag:team", "month"], YEAR_AGO, TODAY + DAY, "team=Ä,\n=")
    assert {tuple(row.group): figures_of(row) for row in answer.rows} == wanted
    assert wanted


async def test_pages_come_in_order_and_each_has_the_total(ledgered: Ledgered) -> None:
    question: dict[str, Any] = {"group_by": ["month", "model"], "from": YEAR_AGO, "to": TODAY + DAY, "page_size": 5}
    first = await ledgered.ask(**question)
    second = await ledgered.ask(**question, cursor=first.next_cursor)
    assert len(first.rows) == len(second.rows) == 5
    months = [int(row.group[0]) for row in (*first.rows, *second.rows)]
    assert months == sorted(months)
    assert first.total == second.total == (await ledgered.ask(**{**question, "page_size": 1000})).total
    async with refused(ErrorKind.UNPROCESSABLE, "cursor"):
        await ledgered.ask(**{**question, "group_by": ["model", "month"]}, cursor=first.next_cursor)
    async with refused(ErrorKind.UNPROCESSABLE, "limit"):
        await ledgered.ask(**{**question, "page_size": 1001})


async def test_an_empty_ledger_has_a_total(ledgered: Ledgered) -> None:
    answer = await ledgered.ask(**{"from": YEAR_AGO - 30 * DAY, "to": YEAR_AGO - 10 * DAY})
    assert [figures_of(row) for row in (answer.total, *answer.rows)] == [[0] * 7] * 2
    assert answer.total.cost == format_dollars(0)
    grouped = await ledgered.ask(group_by=["day"], **{"from": YEAR_AGO - 30 * DAY, "to": YEAR_AGO - 10 * DAY})
    assert (list(grouped.rows), figures_of(grouped.total)) == ([], [0] * 7)


async def test_who_reads_one_project_sees_that_one(ledgered: Ledgered) -> None:
    span = {"from": YEAR_AGO, "to": TODAY + DAY}
    one, two = ledgered.projects
    seen = await ledgered.ask(ledgered.sam, group_by=["project"], **span)
    assert {tuple(row.group): figures_of(row) for row in seen.rows} == expected(
        [row for row in ledgered.rows if row.project_id == one], ["project"], YEAR_AGO, TODAY + DAY
    )
    assert (await ledgered.ask(ledgered.sam, project_ids=[one], **span)).total == seen.total
    async with refused(ErrorKind.PERMISSION_DENIED):
        await ledgered.ask(ledgered.sam, project_ids=[one, two], **span)
    nobody = await ledgered.auth.add_person(ledgered.ada.organisation_id, roles={"": "auditor", one: "developer"})
    assert (await ledgered.ask(nobody, **span)).total == (await ledgered.ask(**span)).total


async def test_another_organisation_is_not_there(ledgered: Ledgered) -> None:
    span = {"from": YEAR_AGO, "to": TODAY + DAY}
    theirs = await ledgered.ask(ledgered.olga, group_by=["project"], **span)
    assert [list(row.group) for row in theirs.rows] == [[ledgered.other_project]]
    assert theirs.total.requests == 20
    for person, project in ((ledgered.ada, ledgered.other_project), (ledgered.olga, ledgered.projects[0])):
        async with refused(ErrorKind.NOT_FOUND, "project_id"):
            await ledgered.ask(person, project_ids=[project], **span)
    async with refused(ErrorKind.INVALID_TOKEN):
        await ledgered.auth.call(None, "QueryUsage", pb.QueryUsageRequest())


async def test_a_deleted_project_keeps_its_usage(ledgered: Ledgered) -> None:
    owner = await ledgered.auth.add_person(ledgered.ada.organisation_id, roles={"": "owner"})
    await ledgered.auth.call(owner, "DeleteProject", admin_pb2.DeleteRequest(id=ledgered.projects[1]))
    answer = await ledgered.ask(project_ids=[ledgered.projects[1]], **{"from": YEAR_AGO, "to": TODAY + DAY})
    assert answer.total.requests == sum(row.project_id == ledgered.projects[1] for row in ledgered.rows)


def ranges(database: Database, plan: str) -> list[str]:
    """The roll-ups of which the plan reads a range of the primary key, and nothing else of any."""
    if database._engine.dialect.name == "sqlite":
        assert "SCAN usage_" not in plan
        wanted = r"SEARCH (usage_\w+) USING PRIMARY KEY \(organisation_id=\? AND start>\? AND start<\?"
    else:
        assert "Seq Scan on usage_" not in plan
        wanted = r"\bpk_(usage_\w+?)\b.*\n *Index Cond: .*organisation_id = .*start >= .*start < "
    return re.findall(wanted, plan)


async def test_a_year_is_answered_from_roll_ups_of_days_alone(ledgered: Ledgered, database: Database) -> None:
    span = {"from": YEAR_AGO, "to": TODAY + DAY, "page_size": 1}
    questions = [{"group_by": groups, **span} for groups in ([], ["project"], ["month", "model"], ["day", "tag:team"])]
    plans = await ledgered.plans(database, *questions)
    assert len(plans) >= 4
    for statement, plan in plans:
        assert ranges(database, plan) == ["usage_daily_tags" if "usage_daily_tags" in statement else "usage_daily"]


async def test_hours_are_read_for_the_ends_of_the_range_only(ledgered: Ledgered, database: Database) -> None:
    span = {"from": YEAR_AGO + HOUR, "to": TODAY + 5 * HOUR}
    questions = [{"group_by": groups, **span} for groups in ([], ["project"], ["month", "model"])]
    for _, plan in await ledgered.plans(database, *questions):
        assert ranges(database, plan) == ["usage_hourly", "usage_daily", "usage_hourly"]
    ((_, plan),) = await ledgered.plans(database, {"group_by": ["hour"], "from": TODAY - DAY, "to": TODAY + HOUR})
    assert ranges(database, plan) == ["usage_hourly"]
