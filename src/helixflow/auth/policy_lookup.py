"""Which limits and budgets apply to somebody: what gateways ask for and keep."""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)

from helixflow.auth.lookups import Lookups
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import Scope
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.storage.schema import budgets, limits

_LIMIT: Final = 1
_BUDGET: Final = 2


async def resolve_policies(lookups: Lookups, request: pb.ResolvePoliciesRequest) -> pb.ResolvePoliciesResponse:
    """All of the installation, the organisation, the project, the user and the key, imposed and own ones, by id.

    One SELECT: 0.1 ms of the database, 0.5 of ours. Raises `HelixError`.
    """
    if not request.organisation_id:
        raise HelixError(ErrorKind.INVALID_VALUE, "Say in which organisation.", param="organisation_id")
    parameters = {
        "organisation": request.organisation_id,
        "project": request.project_id,
        "user": request.user_id,
        "key": request.key_id,
    }
    answer = pb.ResolvePoliciesResponse()
    # Always in one order: gateways recognise what they have had already.
    found = map(tuple, await lookups.execute(_APPLYING, parameters))
    for sort, id_, scope, subject, model, kind, amount, rest in sorted(found):
        if sort == _LIMIT:
            answer.limits.add(
                id=id_, scope=scope, subject_id=subject, model=model, metric=kind, value=amount, burst=rest
            )
        else:
            answer.budgets.add(id=id_, scope=scope, subject_id=subject, unit=kind, cap=amount, period=rest)
    return answer


def _applying(table: Table) -> ColumnElement[bool]:
    """By the index that makes policies one of a kind."""
    organisation = bindparam("organisation", type_=Text)
    subjects = {
        Scope.ORGANISATION: organisation,
        Scope.PROJECT: bindparam("project", type_=Text),
        Scope.USER: bindparam("user", type_=Text),
        Scope.KEY: bindparam("key", type_=Text),
    }
    place = tuple_(table.c.organisation_id, table.c.scope, table.c.subject_id)
    return or_(
        place == tuple_("", Scope.INSTALLATION.value, ""),
        *(place == tuple_(organisation, scope.value, subject) for scope, subject in subjects.items()),
    )


def _part(sort: int, table: Table, columns: Sequence[ColumnElement[Any]]) -> "Select[Any]":
    common = (literal(sort, Integer), table.c.id, table.c.scope, table.c.subject_id)
    return select(*common, *columns).where(_applying(table))


# Built once: making a statement takes longer than to run it.
_APPLYING: Final = union_all(
    _part(_LIMIT, limits, (limits.c.model, limits.c.metric, limits.c.value, limits.c.burst)),
    _part(_BUDGET, budgets, (literal("", Text), budgets.c.unit, budgets.c.cap, budgets.c.period.cast(BigInteger))),
)
