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
    and_,
    bindparam,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)

from helixflow.auth.key_chains import with_predecessors
from helixflow.auth.lookups import Lookups
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import Scope
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.storage.schema import budgets, limits

_LIMIT: Final = 1
_BUDGET: Final = 2
_PREDECESSOR: Final = 3
_ORGANISATION: Final = bindparam("organisation", type_=Text)
_KEY: Final = bindparam("key", type_=Text)


async def resolve_policies(lookups: Lookups, request: pb.ResolvePoliciesRequest) -> pb.ResolvePoliciesResponse:
    """All of the installation, the organisation, the project, the user and the key, imposed and own ones, by id. Those
    of a key are also those of all keys that it was rotated from.

    One SELECT: 0.4 ms with SQLite, 0.8 with PostgreSQL. Raises `HelixError`.
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
        elif sort == _PREDECESSOR:
            answer.predecessors.append(id_)
        else:
            answer.budgets.add(id=id_, scope=scope, subject_id=subject, unit=kind, cap=amount, period=rest)
    return answer


def _applying(table: Table) -> ColumnElement[bool]:
    """By the index that makes policies one of a kind."""
    subjects = {
        Scope.ORGANISATION: _ORGANISATION,
        Scope.PROJECT: bindparam("project", type_=Text),
        Scope.USER: bindparam("user", type_=Text),
    }
    place = tuple_(table.c.organisation_id, table.c.scope, table.c.subject_id)
    return or_(
        place == tuple_("", Scope.INSTALLATION.value, ""),
        *(place == tuple_(_ORGANISATION, scope.value, subject) for scope, subject in subjects.items()),
    )


def _parts(sort: int, table: Table, columns: Sequence[ColumnElement[Any]]) -> "list[Select[Any]]":
    """Those on what the caller is in; and apart, for the same index to serve both, those on the chain of its key."""
    found = select(literal(sort, Integer), table.c.id, table.c.scope, table.c.subject_id, *columns)
    on_key = and_(
        table.c.organisation_id == _ORGANISATION,
        table.c.scope == Scope.KEY.value,
        table.c.subject_id.in_(select(_CHAIN.c.id)),
    )
    return [found.where(_applying(table)), found.where(on_key)]


_CHAIN: Final = with_predecessors(_KEY)
_NO_TEXT: Final = literal("", Text)
_NO_NUMBER: Final = literal(0, BigInteger)
# Built once: making a statement takes longer than to run it.
_APPLYING: Final = union_all(
    *_parts(_LIMIT, limits, (limits.c.model, limits.c.metric, limits.c.value, limits.c.burst)),
    *_parts(_BUDGET, budgets, (_NO_TEXT, budgets.c.unit, budgets.c.cap, budgets.c.period.cast(BigInteger))),
    select(
        *(literal(_PREDECESSOR, Integer), _CHAIN.c.id, literal(0, Integer), _NO_TEXT),
        *(_NO_TEXT, literal(0, Integer), _NO_NUMBER, _NO_NUMBER),
    ).where(_CHAIN.c.id != _KEY),
)
