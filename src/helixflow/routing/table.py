"""Which names can be asked for and what serves each: made once of the settings, and then only read."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import accumulate
from types import MappingProxyType
from typing import Final

from helixflow.core.call import NO_PLAN, Call, Plan
from helixflow.core.errors import ErrorKind
from helixflow.routing.splits import Splitter
from helixflow.routing.target import Target
from helixflow.settings.deployments import VllmDeployment
from helixflow.settings.models import ModelSettings

_NANODOLLARS: Final = 10**9
# What says that another deployment, or another model, may do better. A client's own mistakes are not repeated.
ELSEWHERE: Final = frozenset(
    {
        ErrorKind.UPSTREAM_UNAVAILABLE,
        ErrorKind.UPSTREAM_INVALID,
        ErrorKind.OVERLOADED,
        ErrorKind.LOADING,
        ErrorKind.NOT_SERVED,
        ErrorKind.RATE_LIMITED,
    }
)
_NOWHERE: Final = frozenset({""})
_FALLBACK_KINDS: Final = {
    "error": ELSEWHERE | {ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE},
    "context_length": frozenset({ErrorKind.CONTEXT_LENGTH_EXCEEDED}),
    "content_filter": frozenset({ErrorKind.CONTENT_FILTERED}),
}


@dataclass(frozen=True, slots=True)
class Tier:
    """Deployments that share requests. `shares` are the running sums of their weights; None when all are equal."""

    targets: Sequence[Target]
    shares: Sequence[float] | None


@dataclass(frozen=True, slots=True)
class Route:
    """A public model. `created` is in seconds since the epoch.

    `tiers` are tried in order, then the `reserves`, whose weight is 0. A split has neither, but `ways`: routes of other
    models, one of which `splitter` names. `fallbacks` are tried when that has failed with one of `fallback_kinds`;
    they, and the ways, have no fallbacks here, whatever their models have. Only deployments of all `regions` may serve
    it, and such as charge at most `max_cost` nanodollars; what holds for a model holds for its ways and fallbacks too.
    The `plan` is that of all that it may lead to; ways and fallbacks have none here. `sole` is the only deployment of a
    model where nothing is to be decided: without limits and fallbacks.
    """

    model: str
    tiers: Sequence[Tier] = ()
    reserves: Sequence[Target] = ()
    regions: frozenset[str] = frozenset()
    affinity: bool = True
    by_cost: bool = False
    max_cost: int | None = None
    hedge_after_s: float | None = None
    splitter: Splitter | None = None
    ways: Mapping[str, "Route"] = field(default_factory=dict)
    fallbacks: Sequence["Route"] = ()
    fallback_kinds: Collection[ErrorKind] = ()
    created: int = 0
    owned_by: str = "helixflow"
    least_context: int = 0
    plan: Plan = NO_PLAN
    sole: Target | None = None

    @property
    def targets(self) -> list[Target]:
        """All of its own deployments."""
        return [*(target for tier in self.tiers for target in tier.targets), *self.reserves]

    def way(self, call: Call) -> "Route":
        """Itself, or the way of a split that the call goes: one that may serve it in its regions, if any may."""
        if self.splitter is None:
            return self
        demanded = demanded_regions(call)
        allowed = [name for name, way in self.ways.items() if way.is_served_in(demanded)]
        return self.ways[self.splitter.choose(call, allowed or None)]

    def is_served_in(self, demanded: frozenset[str]) -> bool:
        """Whether any of its own deployments is of all regions that are demanded, here and there."""
        regions = self.regions | demanded if demanded else self.regions
        return not regions or any(is_within(regions, target) for target in self.targets)


def demanded_regions(call: Call) -> frozenset[str]:
    """The regions that the caller and the request demand: all are to be met."""
    return frozenset((call.principal.residency, call.hints.residency)) - _NOWHERE


def is_within(regions: frozenset[str], target: Target) -> bool:
    """Whether the target is of all these regions; one that does not say where it computes is outside of all."""
    return all(region == target.region for region in regions)


class RoutingTable:
    """All routes, by name and by alias. Immutable: another configuration is another table."""

    __slots__ = ("routes",)

    def __init__(self, routes: Mapping[str, Route]) -> None:
        """`routes` has an entry for each name and each alias; those of a model are the same object."""
        self.routes: Mapping[str, Route] = MappingProxyType(dict(routes))


def build_table(models: Sequence[ModelSettings], targets: Mapping[str, Target], *, created: int) -> RoutingTable:
    """`models` have passed `check_models`, and `targets` has all of their deployments, by name.

    Names. A client asks for a model by its name or an alias, and the answer names it so; limits, budgets, records and
    keys' restrictions know it by its own name. A split, and a model with fallbacks, is a model like others: its own
    limits hold for it, and who may use it need not be allowed to use what it leads to. What was really used says the
    deployment, in records and in `x-helixflow-deployment`; and prices are those of deployments.
    """
    by_name = {name: model for model in models for name in (model.name, *model.aliases)}
    own = {model.name: _own_route(model, targets, created) for model in models if not model.split}
    served = dict(own)
    for model in models:
        if model.split:
            route = _own_route(model, targets, created)
            ways = {way.model: _under(route, own[by_name[way.model].name]) for way in model.split}
            splitter = Splitter(model.name, [(way.model, way.weight) for way in model.split])
            served[model.name] = replace(route, splitter=splitter, ways=ways)
    routes: dict[str, Route] = {}
    for model in models:
        route = served[model.name]
        if model.fallbacks:
            route = replace(
                route,
                fallbacks=tuple(_under(route, served[by_name[name].name]) for name in model.fallbacks),
                fallback_kinds=frozenset[ErrorKind]().union(*(_FALLBACK_KINDS[reason] for reason in model.fallback_on)),
            )
        route = replace(route, plan=_plan(route))
        for name in (model.name, *model.aliases):
            routes[name] = route
    for model in models:
        for name in _adapters(model):
            routes.setdefault(name, routes[model.name])
    return RoutingTable(routes)


def _adapters(model: ModelSettings) -> list[str]:
    """`<model>:<adapter>` for each LoRA adapter that all of its deployments have; fallbacks answer without it."""
    named = [frozenset(one.lora if isinstance(one, VllmDeployment) else ()) for one in model.deployments]
    common = named[0].intersection(*named) if named else frozenset()
    return [f"{model.name}:{adapter}" for adapter in sorted(common)]


def _own_route(model: ModelSettings, targets: Mapping[str, Target], created: int) -> Route:
    """Without ways and fallbacks."""
    own = [targets[name] for name, _ in model.named_deployments()]
    numbers = sorted({target.tier for target in own if target.weight})
    tiers = [[target for target in own if target.tier == number and target.weight] for number in numbers]
    return Route(
        model.name,
        tuple(Tier(tuple(tier), running_shares(tier)) for tier in tiers),
        tuple(sorted((target for target in own if not target.weight), key=lambda target: target.tier)),
        regions=frozenset({model.residency} if model.residency is not None else ()),
        affinity=model.affinity,
        by_cost=model.balance == "cost",
        max_cost=int(Decimal(model.max_cost) * _NANODOLLARS) if model.max_cost is not None else None,
        hedge_after_s=model.hedge_after_s,
        created=created,
        least_context=min((target.context for target in own), default=0),
        sole=own[0] if len(own) == 1 and not (model.fallbacks or model.residency or model.max_cost) else None,
    )


def _under(asked: Route, other: Route) -> Route:
    """The route of another model, under the conditions of the one that was asked for as well."""
    limits = [limit for limit in (asked.max_cost, other.max_cost) if limit is not None]
    return replace(
        other,
        regions=asked.regions | other.regions,
        max_cost=min(limits, default=None),
        ways={name: _under(asked, way) for name, way in other.ways.items()},
        sole=None,
    )


def running_shares(targets: Sequence[Target]) -> Sequence[float] | None:
    """Running sums of the weights; None when all are equal."""
    weights = [target.weight for target in targets]
    return None if len(set(weights)) <= 1 else tuple(accumulate(weights))


def _plan(route: Route) -> Plan:
    """What a budget must reserve for."""
    served = [one for way in (route, *route.fallbacks) for one in (way, *way.ways.values())]
    targets = {target.deployment: target for way in served for target in way.targets}
    return Plan(
        tuple(targets),
        max((target.context for target in targets.values()), default=0),
        2 if any(way.hedge_after_s is not None and len(way.targets) > 1 for way in served) else 1,
    )
