"""From a public model name to the first deployment that answers."""

import difflib
from collections.abc import Collection, Mapping
from functools import partial

from helixflow.core.call import Call, Stream, Usage
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.routing.attempt import is_slow, open_on
from helixflow.routing.balancing import Balancer
from helixflow.routing.candidates import Candidates, CostBound
from helixflow.routing.hedging import open_hedged
from helixflow.routing.retry_budget import RetryBudget
from helixflow.routing.table import ELSEWHERE, Route, RoutingTable, demanded_regions
from helixflow.routing.target import Target


class Router:
    """Implements `Completer` over the routes of a table, which may be replaced at any time."""

    def __init__(
        self,
        table: RoutingTable,
        *,
        balancer: Balancer,
        retries: RetryBudget,
        clock: Clock,
        cost_bound: CostBound | None = None,
    ) -> None:
        """`cost_bound` gives the nanodollars that a call may cost at most at a deployment; None where nothing has a
        price.
        """
        self._table = table
        self._balancer = balancer
        self._retries = retries
        self._monotonic = clock.monotonic
        self._cost_bound = cost_bound

    @property
    def table(self) -> RoutingTable:
        return self._table

    @property
    def routes(self) -> Mapping[str, Route]:
        """By all names that can be asked for, aliases too."""
        return self._table.routes

    def replace(self, table: RoutingTable) -> None:
        """From now on calls are routed by this one; those under way go on as they began."""
        self._table = table

    def route(self, model: str, *, among: Collection[str] | None = None) -> Route:
        """The route of a name or an alias.

        Raises `HelixError` MODEL_NOT_FOUND naming close matches; as if there were only the models `among` those, which
        are names or aliases.
        """
        routes = self._table.routes
        route = routes.get(model)
        if route is not None and (among is None or route.model in among or model in among):
            return route
        known = [name for name, one in routes.items() if among is None or one.model in among or name in among]
        close = difflib.get_close_matches(model[:256], known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else " GET /v1/models lists them."
        raise HelixError(ErrorKind.MODEL_NOT_FOUND, f"The model '{model[:256]}' does not exist.{hint}", param="model")

    async def open(self, call: Call) -> Stream:
        """Tries deployments until one's first content is at hand; nothing has reached the client before.

        First those of the model, then those of its fallbacks if it failed for a reason that they are for. Retries are
        made as far as their budget goes. A call that has a route goes that way, also when another table is in use by
        now. Raises the `HelixError` of the last that was tried, or says why none was.
        """
        self._retries.note_request()
        asked = call.route if isinstance(call.route, Route) else self.route(call.model)
        sole = asked.sole
        if sole is not None and sole.health.is_untroubled and not (sole.ceiling.is_active or demanded_regions(call)):
            # Nothing is to be decided, and nobody else could be tried.
            return await open_on(sole, call, self._monotonic)
        error: HelixError | None = None
        refusal: HelixError | None = None
        for way in (asked, *asked.fallbacks) if asked.fallbacks else (asked,):
            if error is not None and not _leads_on(asked, error, call):
                break
            candidates = Candidates(way.way(call), call, self._balancer, self._cost_bound)
            target = candidates.next()
            if target is None and refusal is None:
                refusal = candidates.refusal()
                if ErrorKind.UNAVAILABLE not in asked.fallback_kinds:
                    break
            while target is not None:
                if error is not None and not self._begin_again(call, error):
                    raise error
                try:
                    return await self._open_on(target, call, candidates)
                except HelixError as exc:
                    error = exc
                if error.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED:
                    candidates.need_context_above(target.context)
                elif not _is_elsewhere(error, call):
                    break
                target = candidates.next()
        error = error or refusal
        assert error is not None
        raise error

    async def _open_on(self, target: Target, call: Call, candidates: Candidates) -> Stream:
        """One attempt, or two that race each other where the model is hedged."""
        after_s = candidates.way.hedge_after_s
        if after_s is None or not call.stream:
            return await open_on(target, call, self._monotonic)
        return await open_hedged(
            call,
            target,
            after_s=after_s,
            open_one=self._open_hedge,
            next_target=partial(self._next_hedge, candidates, target),
            tries_elsewhere=partial(_is_elsewhere, call=call),
        )

    async def _open_hedge(self, call: Call, target: Target) -> Stream:
        return await open_on(target, call, self._monotonic)

    def _next_hedge(self, candidates: Candidates, first: Target) -> Target | None:
        return candidates.next_beside(first) if self._retries.try_retry() else None

    def _begin_again(self, call: Call, error: HelixError) -> bool:
        """Whether one more attempt may be made after that error; notes the one that failed."""
        if error.kind in ELSEWHERE | {ErrorKind.DEADLINE} and not self._retries.try_retry():
            return False
        progress = call.progress
        progress.attempts += ((progress.deployment, error.code),)
        # What it made is thrown away, and nobody pays for it.
        progress.usage = Usage()
        progress.first_content_at = progress.finish_reason = None
        progress.complete = False
        return True


def _is_elsewhere(error: HelixError, call: Call) -> bool:
    """Whether another deployment of the model may do better."""
    return error.kind in ELSEWHERE or is_slow(error.kind, call)


def _leads_on(asked: Route, error: HelixError, call: Call) -> bool:
    """Whether the fallbacks are for that."""
    kind = error.kind
    return kind in asked.fallback_kinds and (kind is not ErrorKind.DEADLINE or is_slow(kind, call))
