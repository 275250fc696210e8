"""Usage, summed up: the operation of UsageService that answers from roll-ups alone, never from single requests."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    Select,
    Subquery,
    Table,
    case,
    func,
    literal,
    select,
    tuple_,
    union_all,
)

from helixflow.auth.dispatch import Operation
from helixflow.auth.ledger.usage_query import (
    COLUMNS,
    TAG,
    Grain,
    Part,
    UsageQuery,
    decode_position,
    encode_position,
    parse_usage_query,
)
from helixflow.auth.ledger.visibility import visible_projects
from helixflow.auth.paging import DEFAULT_SIZE
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.money import format_dollars
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.schema import usage_daily, usage_daily_tags, usage_hourly

MAX_SIZE: Final = 1000
MAX_FILTER: Final = 1000
_FILTERS: Final = ("key_id", "user_id", "model", "operation")
_SUMS: Final = (
    "requests",
    "failed_requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cost",
)


async def query_usage(unit: Unit, request: pb.QueryUsageRequest) -> pb.QueryUsageResponse:
    """Rows in the order of their groups, by keyset; without groups one row, the total.

    Raises `HelixError` UNPROCESSABLE that names the field; NOT_FOUND and PERMISSION_DENIED for projects.
    """
    query = parse_usage_query(request, unit.now)
    size = _page_size(request.page_size)
    filters = {name: _filter(getattr(request, f"{name}s"), name) for name in _FILTERS}
    visible = await visible_projects(unit, _filter(request.project_ids, "project_id"))
    used = _select_used(query, unit.caller.organisation_id, visible, filters)
    rows, cursor = await _read_page(unit, used, query, size, request.cursor)
    # One page alone is all there is: no second question.
    total = _add_up(rows) if not request.cursor and not cursor else await _read_total(unit, used)
    shown = [_message(row, len(query.groups)) for row in rows] if query.groups else [total]
    answer = pb.QueryUsageResponse(rows=shown, next_cursor=cursor, total=total, to=query.end)
    setattr(answer, "from", query.start)  # a keyword of Python
    return answer


def _page_size(page_size: int) -> int:
    if not 0 <= page_size <= MAX_SIZE:
        raise HelixError(ErrorKind.UNPROCESSABLE, f"A page has 1 to {MAX_SIZE} entries.", param="limit")
    return page_size or DEFAULT_SIZE


def _filter(values: Sequence[str], name: str) -> list[str]:
    if len(values) > MAX_FILTER:
        raise HelixError(ErrorKind.UNPROCESSABLE, f"Name {MAX_FILTER} at most.", param=name)
    return list(values)


def _select_used(
    query: UsageQuery, organisation_id: str, visible: frozenset[str] | None, filters: Mapping[str, Sequence[str]]
) -> Subquery:
    """The rows of roll-ups that count, with their groups as g0, g1, …; `visible` projects, None for all."""
    selects = [_select_part(query, part, organisation_id, visible, filters) for part in query.parts()]
    return (union_all(*selects) if len(selects) > 1 else selects[0]).subquery("used")


def _select_part(
    query: UsageQuery,
    part: Part,
    organisation_id: str,
    visible: frozenset[str] | None,
    filters: Mapping[str, Sequence[str]],
) -> "Select[Any]":
    table = _roll_up_of(query, part.grain)
    groups = [_group(query, table, name).label(f"g{index}") for index, name in enumerate(query.groups)]
    used = select(*groups, *(table.c[name] for name in _SUMS)).where(
        table.c.organisation_id == organisation_id, table.c.start >= part.start, table.c.start < part.end
    )
    if query.tag:
        used = used.where(table.c.tag == query.tag)
    if query.tag_value is not None:
        used = used.where(table.c.tag_value == query.tag_value)
    if visible is not None:
        used = used.where(table.c.project_id.in_(sorted(visible)))
    for name, values in filters.items():
        if values:
            used = used.where(table.c[name].in_(values))
    return used


def _roll_up_of(query: UsageQuery, grain: Grain) -> Table:
    if query.tag:
        return usage_daily_tags
    return usage_hourly if grain is Grain.HOUR else usage_daily


def _group(query: UsageQuery, table: Table, name: str) -> ColumnElement[Any]:
    start = table.c.start
    match name:
        case "hour":
            return start
        case "day":
            return start - start % int(Grain.DAY)
        case "month":
            starts = query.month_starts()
            months = [(start < later, literal(month, BigInteger)) for month, later in pairwise(starts)]
            last = literal(starts[-1], BigInteger)
            return case(*months, else_=last) if months else last
        case _ if name.startswith(TAG):
            return table.c.tag_value
        case _:
            return table.c[COLUMNS[name]]


async def _read_page(
    unit: Unit, used: Subquery, query: UsageQuery, size: int, cursor: str
) -> tuple[Sequence[Row[Any]], str]:
    groups = [used.c[f"g{index}"] for index in range(len(query.groups))]
    if not groups:
        if cursor:
            decode_position(cursor, query.groups)
        return [await _sum_up(unit, _summed(used))], ""
    summed = _summed(used, *groups).group_by(*groups).order_by(*groups).limit(size + 1)
    if cursor:
        position = decode_position(cursor, query.groups)
        after = (literal(value, group.type) for value, group in zip(position, groups, strict=True))
        summed = summed.where(tuple_(*groups) > tuple_(*after))
    rows = (await unit.connection.execute(summed)).all()
    if len(rows) <= size:
        return rows, ""
    return rows[:size], encode_position(tuple(rows[size - 1][: len(groups)]))


def _summed(used: Subquery, *groups: ColumnElement[Any]) -> "Select[Any]":
    return select(*groups, *(func.coalesce(func.sum(used.c[name]), 0).label(name) for name in _SUMS))


async def _sum_up(unit: Unit, summed: "Select[Any]") -> Row[Any]:
    row: Row[Any] = (await unit.connection.execute(summed)).one()
    return row


async def _read_total(unit: Unit, used: Subquery) -> pb.UsageRow:
    return _message(await _sum_up(unit, _summed(used)), 0)


def _add_up(rows: Sequence[Row[Any]]) -> pb.UsageRow:
    sums = {name: sum(int(getattr(row, name)) for row in rows) for name in _SUMS}
    return _usage_row((), sums)


def _message(row: Row[Any], groups: int) -> pb.UsageRow:
    # PostgreSQL sums big integers up as decimals.
    return _usage_row(map(str, row[:groups]), {name: int(getattr(row, name)) for name in _SUMS})


def _usage_row(group: Iterable[str], sums: Mapping[str, int]) -> pb.UsageRow:
    figures = {name: value for name, value in sums.items() if name != "cost"}
    return pb.UsageRow(group=group, cost=format_dollars(sums["cost"]), **figures)


OPERATIONS: Final[Mapping[str, Operation]] = {"QueryUsage": Operation(query_usage)}
