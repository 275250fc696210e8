"""What the auth service is asked of somebody's limits and budgets, and what its answer means."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.metering.policies import Budget, Limit, Metric, Period, Policies, Scope, Unit
from helixflow.rpc.generated.auth_v1 import metering_pb2

_SHARED: Final = 4096


@dataclass(frozen=True, slots=True)
class Applying:
    """What a principal's calls must fit: of models that limits name, and of all others."""

    by_model: Mapping[str, Policies]
    otherwise: Policies


def policy_request(principal: Principal) -> metering_pb2.ResolvePoliciesRequest:
    """The question about somebody: a key and whom it acts for, or who has signed in."""
    is_key = principal.kind is PrincipalKind.KEY
    return metering_pb2.ResolvePoliciesRequest(
        organisation_id=principal.organisation_id,
        project_id=principal.project_id,
        user_id=principal.owner_id if is_key else principal.id,
        key_id=principal.id if is_key else "",
    )


def read_policies(answer: metering_pb2.ResolvePoliciesResponse, organisation_id: str) -> Applying:
    """Raises `HelixError` UPSTREAM_INVALID for what only a newer version understands: it cannot be enforced."""
    try:
        limits = tuple(
            _limit(
                limit.id,
                "" if limit.scope == Scope.INSTALLATION.value else organisation_id,
                Scope(limit.scope),
                limit.subject_id,
                limit.model,
                Metric(limit.metric),
                limit.value,
                limit.burst,
            )
            for limit in answer.limits
        )
        budgets = tuple(
            _budget(
                budget.id,
                organisation_id,
                Scope(budget.scope),
                budget.subject_id,
                Unit(budget.unit),
                Period(budget.period),
                budget.cap,
            )
            for budget in answer.budgets
        )
    except ValueError as exc:
        message = "The auth service knows limits that this gateway does not: bring both to the same version."
        raise HelixError(ErrorKind.UPSTREAM_INVALID, message) from exc
    return _applying(limits, budgets)


# The principals of an organisation share what is on it: a full cache holds few different ones.
_limit = lru_cache(maxsize=_SHARED)(Limit)
_budget = lru_cache(maxsize=_SHARED)(Budget)


@lru_cache(maxsize=_SHARED)
def _applying(limits: tuple[Limit, ...], budgets: tuple[Budget, ...]) -> Applying:
    policies = Policies(limits, budgets)
    models = {limit.model for limit in limits} - {""}
    return Applying({model: policies.for_model(model) for model in models}, policies.for_model(""))
