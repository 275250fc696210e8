"""Which limits and budgets apply to somebody: what gateways ask for and keep."""

from typing import Any, Final

from sqlalchemy import BindParameter, Select, Table, bindparam, or_, select, tuple_

from helixflow.auth.lookups import Lookups
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import Scope
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.storage.schema import budgets, limits


async def resolve_policies(lookups: Lookups, request: pb.ResolvePoliciesRequest) -> pb.ResolvePoliciesResponse:
    """All of the installation, the organisation, the project, the user and the key, imposed and own ones.

    What changes between the two SELECTs is told as a change. Raises `HelixError`.
    """
    if not request.organisation_id:
        raise HelixError(ErrorKind.INVALID_VALUE, "Say in which organisation.", param="organisation_id")
    parameters = {
        "organisation": request.organisation_id,
        "project": request.project_id,
        "user": request.user_id,
        "key": request.key_id,
    }
    found_limits = await lookups.execute(_LIMITS, parameters)
    found_budgets = await lookups.execute(_BUDGETS, parameters)
    return pb.ResolvePoliciesResponse(
        limits=[pb.PolicyLimit(**row._asdict()) for row in found_limits],
        budgets=[pb.PolicyBudget(**row._asdict()) for row in found_budgets],
    )


def _applying(table: Table, message: Any) -> "Select[Any]":
    """A SELECT of the fields of `message`, by the index that makes policies one of a kind."""
    organisation: BindParameter[str] = bindparam("organisation")
    subjects = {
        Scope.ORGANISATION: organisation,
        Scope.PROJECT: bindparam("project"),
        Scope.USER: bindparam("user"),
        Scope.KEY: bindparam("key"),
    }
    place = tuple_(table.c.organisation_id, table.c.scope, table.c.subject_id)
    return (
        select(*(table.c[field.name] for field in message.DESCRIPTOR.fields))
        .where(
            or_(
                place == tuple_("", Scope.INSTALLATION.value, ""),
                *(place == tuple_(organisation, scope.value, subject) for scope, subject in subjects.items()),
            )
        )
        .order_by(table.c.id)
    )


# Built once: making a statement takes longer than to run it.
_LIMITS: Final = _applying(limits, pb.PolicyLimit)
_BUDGETS: Final = _applying(budgets, pb.PolicyBudget)
