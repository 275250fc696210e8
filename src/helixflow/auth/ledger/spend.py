"""What budgets have spent, out of the daily roll-ups: periods are of whole days."""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.key_chains import with_successors
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import DAY_MS, Scope, Unit
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.storage.schema import api_keys, usage_daily

MAX_QUERIES: Final = 1_000

_AMOUNTS: Final = {
    Unit.MONEY.value: usage_daily.c.cost,
    Unit.TOKENS.value: usage_daily.c.prompt_tokens + usage_daily.c.completion_tokens,
}
_SUBJECTS: Final = {
    Scope.ORGANISATION.value: usage_daily.c.organisation_id,
    Scope.PROJECT.value: usage_daily.c.project_id,
}
_ASKABLE: Final = (Scope.INSTALLATION.value, *_SUBJECTS, Scope.KEY.value)


def check_queries(queries: Any) -> None:
    """Raises `HelixError` INVALID_VALUE that names the field."""
    if len(queries) > MAX_QUERIES:
        raise _invalid(f"There may be {MAX_QUERIES:,} queries at most.", "queries")
    for index, query in enumerate(queries):
        _check(query, f"queries[{index}]")


async def read_sums(connection: AsyncConnection, queries: Sequence[pb.SpendQuery]) -> list[int]:
    """Nanodollars or tokens of checked queries, in their order. A key's are also those of the keys that it was rotated
    to. Queries that differ in the subject alone are one SELECT: each would look through all of the period.
    """
    groups: dict[tuple[Any, ...], list[pb.SpendQuery]] = {}
    for query in queries:
        groups.setdefault(_group_of(query), []).append(query)
    sums: dict[tuple[Any, ...], dict[str, int]] = {}
    for group, alike in groups.items():
        rows = await connection.execute(spend_query(alike))
        # Those that have spent nothing are left out.
        sums[group] = {row.subject_id: int(row.amount) for row in rows}
    return [sums[_group_of(query)].get(query.subject_id, 0) for query in queries]


def _group_of(query: pb.SpendQuery) -> tuple[Any, ...]:
    return query.scope, query.organisation_id, query.unit, query.from_ms, query.to_ms


def spend_query(alike: Sequence[pb.SpendQuery]) -> Select[tuple[str, Any]]:
    """The SELECT of sums (`amount`) by `subject_id`, for queries that differ in it alone: a range of the primary key,
    but for the installation's.
    """
    first = alike[0]
    amount = func.sum(_AMOUNTS[first.unit]).label("amount")
    if first.scope == Scope.INSTALLATION.value:
        return select(literal("").label("subject_id"), func.coalesce(amount, 0).label("amount")).where(*_within(first))
    asked = {query.subject_id for query in alike}
    # Also for projects and keys: the index begins with it.
    within = (usage_daily.c.organisation_id == first.organisation_id, *_within(first))
    if first.scope == Scope.KEY.value:
        chain = with_successors(select(api_keys.c.id).where(api_keys.c.id.in_(asked)))
        found = select(chain.c.first.label("subject_id"), amount).join(usage_daily, usage_daily.c.key_id == chain.c.id)
        return found.where(*within).group_by(chain.c.first)
    subject = _SUBJECTS[first.scope]
    return select(subject.label("subject_id"), amount).where(subject.in_(asked), *within).group_by(subject)


def _within(query: pb.SpendQuery) -> Sequence[ColumnElement[bool]]:
    if not query.to_ms:
        return ()
    return usage_daily.c.start >= query.from_ms // 1000, usage_daily.c.start < query.to_ms // 1000


def _check(query: pb.SpendQuery, at: str) -> None:
    if query.scope != Scope.INSTALLATION.value:
        if query.scope not in _ASKABLE:
            raise _invalid("Spend is of the installation, an organisation, a project or a key.", f"{at}.scope")
        if not query.subject_id:
            raise _invalid("This scope takes a subject.", f"{at}.subject_id")
        if not query.organisation_id:
            raise _invalid("This scope takes an organisation.", f"{at}.organisation_id")
    if query.unit not in _AMOUNTS:
        raise _invalid("A unit is money or tokens.", f"{at}.unit")
    for name in ("from_ms", "to_ms"):
        if getattr(query, name) % DAY_MS:
            raise _invalid("Periods begin and end at midnight UTC.", f"{at}.{name}")
    if not 0 <= query.from_ms < query.to_ms and (query.from_ms, query.to_ms) != (0, 0):
        raise _invalid("A period ends after it begins.", f"{at}.to_ms")


def _invalid(message: str, param: str) -> HelixError:
    return HelixError(ErrorKind.INVALID_VALUE, message, param=param)
