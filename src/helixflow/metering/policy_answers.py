"""What the auth service is asked of somebody's limits and budgets, and what its answer means."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.metering.policies import Budget, Limit, Metric, Period, Policies, Scope, Unit
from helixflow.rpc.generated.auth_v1 import metering_pb2


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


class PolicyAnswers:
    """Understands answers; `size` of what it has understood are kept, and equal ones are the same object.

    So the principals of an organisation share what is on it, and who is asked for again has the same `Policies`.
    """

    def __init__(self, size: int) -> None:
        self._limit = lru_cache(maxsize=size)(Limit)
        self._budget = lru_cache(maxsize=size)(Budget)
        self._applying = lru_cache(maxsize=size)(_applying)

    def read(self, answer: metering_pb2.ResolvePoliciesResponse, organisation_id: str) -> Applying:
        """Raises `HelixError` UPSTREAM_INVALID for what only a newer version understands: it cannot be enforced."""
        try:
            limits = tuple(
                self._limit(
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
                self._budget(
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
        return self._applying(limits, budgets, tuple(sorted(answer.predecessors)))


def _applying(limits: tuple[Limit, ...], budgets: tuple[Budget, ...], predecessors: tuple[str, ...]) -> Applying:
    policies = Policies(limits, budgets, predecessors)
    models = {limit.model for limit in limits} - {""}
    return Applying({model: policies.for_model(model) for model in models}, policies.for_model(""))
