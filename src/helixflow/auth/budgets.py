"""Budgets: how much money or how many tokens in a day, a month or altogether, and what was reached of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import BigInteger, Row, delete, literal, select

from helixflow.auth.budget_spend import format_amount, parse_cap, period_of, read_spent
from helixflow.auth.dispatch import Operation
from helixflow.auth.paging import read_page
from helixflow.auth.policy_subjects import choose_subject
from helixflow.auth.policy_table import PolicyTable
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import Period, Scope
from helixflow.metering.policies import Unit as BudgetUnit
from helixflow.rpc.generated.auth_v1 import admin_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.schema import budget_events, budgets

MAX_THRESHOLDS: Final = 10
DEFAULT_THRESHOLDS: Final = (50, 80, 100)
_SCOPES: Final = (Scope.ORGANISATION, Scope.PROJECT, Scope.KEY)


def _describe(row: Row[Any]) -> dict[str, Any]:
    unit = BudgetUnit(row.unit)
    return {
        "unit": unit.name.lower(),
        "period": Period(row.period).name.lower(),
        "cap": format_amount(row.cap, unit),
        "thresholds": row.thresholds,
    }


TABLE: Final = PolicyTable(budgets, "budget", ("unit", "period"), _describe)


async def create_budget(unit: Unit, request: pb.CreateBudgetRequest) -> pb.Budget:
    subject = await choose_subject(unit, request, _SCOPES)
    budget_unit = _parse_unit(request.unit)
    values = {
        "unit": budget_unit.value,
        "period": _parse_period(request.period).value,
        "cap": parse_cap(request.cap, budget_unit),
        "thresholds": _check_thresholds(request.thresholds),
    }
    return await _shown(unit, await TABLE.add(unit, subject, request.imposed, values))


async def list_budgets(unit: Unit, request: pb.ListPoliciesRequest) -> pb.ListBudgetsResponse:
    rows, cursor = await TABLE.read_page(unit, request)
    return pb.ListBudgetsResponse(budgets=await _messages(unit, rows), next_cursor=cursor)


async def get_budget(unit: Unit, request: admin_pb2.GetRequest) -> pb.Budget:
    return await _shown(unit, await TABLE.find(unit, request.id))


async def update_budget(unit: Unit, request: pb.UpdateBudgetRequest) -> pb.Budget:
    """With another cap, thresholds of this period count anew: what is not reached any more may be reached again."""
    row = await TABLE.find_changeable(unit, request.id, request.if_version)
    values: dict[str, Any] = {}
    if request.HasField("cap"):
        values["cap"] = parse_cap(request.cap, BudgetUnit(row.unit))
    if request.HasField("thresholds"):
        values["thresholds"] = _check_thresholds(request.thresholds.values)
    after = await TABLE.change(unit, row, values)
    if after.cap > row.cap:
        await _forget_unreached(unit, after)
    return await _shown(unit, after)


async def delete_budget(unit: Unit, request: admin_pb2.DeleteRequest) -> admin_pb2.DeleteResponse:
    """What was reached of it stays in the list of events."""
    await TABLE.remove(unit, await TABLE.find_changeable(unit, request.id, request.if_version))
    return admin_pb2.DeleteResponse()


async def list_budget_events(unit: Unit, request: pb.ListBudgetEventsRequest) -> pb.ListBudgetEventsResponse:
    """Of the caller's organisation; of a budget that is named also those of another one, for operators."""
    events = budget_events.c
    query = select(budget_events)
    if request.budget_id:
        await _check_known(unit, request.budget_id)
        query = query.where(events.budget_id == request.budget_id)
    else:
        query = query.where(events.organisation_id == unit.caller.organisation_id)
    rows, cursor = await read_page(
        unit.connection, query, (events.at, events.id), page_size=request.page_size, cursor=request.cursor
    )
    return pb.ListBudgetEventsResponse(events=map(_event, rows), next_cursor=cursor)


async def _check_known(unit: Unit, budget_id: str) -> None:
    """Whether there is such a budget for the caller. Raises `HelixError` NOT_FOUND."""
    try:
        await TABLE.find(unit, budget_id)
    except HelixError as exc:
        raise HelixError(exc.kind, exc.message, param="budget_id") from exc


async def _forget_unreached(unit: Unit, row: Row[Any]) -> None:
    """What the larger cap undid. What is reached of it all the same is told again."""
    start_ms, _ = period_of(row, unit.now)
    events = budget_events.c
    undone = events.spent * 100 < events.threshold * literal(row.cap, BigInteger)
    this_period = (events.budget_id == row.id, events.period_start == start_ms // 1000)
    await unit.connection.execute(delete(budget_events).where(*this_period, undone))


def _parse_unit(number: int) -> BudgetUnit:
    try:
        return BudgetUnit(number)
    except ValueError as exc:
        raise HelixError(ErrorKind.UNPROCESSABLE, "A budget is of money or of tokens.", param="unit") from exc


def _parse_period(number: int) -> Period:
    try:
        return Period(number)
    except ValueError as exc:
        message = "A budget is for each day or month, or a total."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="period") from exc


def _check_thresholds(thresholds: Sequence[int]) -> list[int]:
    found = list(thresholds) or list(DEFAULT_THRESHOLDS)
    if len(found) > MAX_THRESHOLDS or found != sorted(set(found)) or not (found[0] >= 1 and found[-1] <= 100):
        message = f"Thresholds are up to {MAX_THRESHOLDS} numbers from 1 to 100 (per cent of the cap), growing."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="thresholds")
    return found


async def _shown(unit: Unit, row: Row[Any]) -> pb.Budget:
    return (await _messages(unit, [row]))[0]


async def _messages(unit: Unit, rows: Sequence[Row[Any]]) -> list[pb.Budget]:
    periods = [(row, period_of(row, unit.now)) for row in rows]
    spent = await read_spent(unit.connection, periods)
    return [_message(row, bounds, amount) for (row, bounds), amount in zip(periods, spent, strict=True)]


def _message(row: Row[Any], bounds: tuple[int, int], spent: int) -> pb.Budget:
    unit = BudgetUnit(row.unit)
    return pb.Budget(
        id=row.id,
        organisation_id=row.organisation_id,
        scope=row.scope,
        subject_id=row.subject_id,
        unit=row.unit,
        period=row.period,
        cap=format_amount(row.cap, unit),
        spent=format_amount(spent, unit),
        period_start=bounds[0] // 1000,
        period_end=bounds[1] // 1000,
        thresholds=row.thresholds,
        imposed=row.imposed,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
    )


def _event(row: Row[Any]) -> pb.BudgetEvent:
    unit = BudgetUnit(row.unit)
    return pb.BudgetEvent(
        id=row.id,
        budget_id=row.budget_id,
        threshold=row.threshold,
        spent=format_amount(row.spent, unit),
        cap=format_amount(row.cap, unit),
        period_start=row.period_start,
        at=row.at,
    )


OPERATIONS: Final[Mapping[str, Operation]] = {
    "CreateBudget": Operation(create_budget),
    "ListBudgets": Operation(list_budgets),
    "GetBudget": Operation(get_budget),
    "UpdateBudget": Operation(update_budget),
    "DeleteBudget": Operation(delete_budget),
    "ListBudgetEvents": Operation(list_budget_events),
}
