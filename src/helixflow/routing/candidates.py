"""Which deployments of a model may serve one call, best first. Decides; tries nothing."""

from collections.abc import Callable, Sequence
from typing import Final

from helixflow.core.call import Call
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ChatParams
from helixflow.routing.balancing import Balancer
from helixflow.routing.ceilings import expected_tokens
from helixflow.routing.table import Route, Tier, demanded_regions, is_within, running_shares
from helixflow.routing.target import Target

CostBound = Callable[[str, Call], int]

# No text has so many bytes a token on average: a prompt that is longer than that does not fit, whoever counts.
_MOST_BYTES_A_TOKEN: Final = 16


class Candidates:
    """The targets of a route, which is no split, for one call.

    Left out are those that may not serve it: outside of the region that it must not leave (a deployment that does not
    say where it computes is outside of all), too dear, with too small a context; and those that do not want it now:
    ejected, resting as they asked, at their ceiling. `cost_bound` gives the nanodollars that a call may cost at most at
    a deployment; None where nothing has a price.
    """

    __slots__ = (
        "_balancer",
        "_call",
        "_cost_bound",
        "_costs",
        "_least_context",
        "_limited",
        "_max_cost",
        "_regions",
        "_tried",
        "way",
    )

    def __init__(self, way: Route, call: Call, balancer: Balancer, cost_bound: CostBound | None) -> None:
        self.way = way
        self._call = call
        self._balancer = balancer
        self._cost_bound = cost_bound
        self._tried: list[Target] = []
        self._regions = way.regions
        if call.principal.residency or call.hints.residency:
            self._regions |= demanded_regions(call)
        self._max_cost = way.max_cost
        if self._max_cost is not None:
            self._costs: dict[str, int] = {}
        self._least_context = 0
        if call.body_bytes > way.least_context * _MOST_BYTES_A_TOKEN:
            self._least_context = self._context_needed()
        self._limited = self._max_cost is not None or self._least_context > 0 or len(self._regions) > 0

    def next(self) -> Target | None:
        """The best one that has not been given yet; None when none is left.

        By tiers, then those without a weight; at last, better than nothing, those that are ejected.
        """
        tried = self._tried
        target = None
        for tier in self.way.tiers:
            if (target := self._of_tier(tier)) is not None:
                break
        else:
            for target in self.way.reserves:
                if self._may_have(target):
                    break
            else:
                target = self._of_ejected()
        if target is not None:
            tried.append(target)
        return target

    def next_beside(self, running: Target) -> Target | None:
        """As `next`, while another attempt runs that is to be paid too: both stay within `max_cost`."""
        most = self._max_cost
        if most is None or self._cost_bound is None:
            return self.next()
        self._max_cost = most - self._cost(running.deployment, self._cost_bound)
        try:
            return self.next()
        finally:
            self._max_cost = most

    def need_context_above(self, context: int) -> None:
        """The call was found not to fit into so many tokens."""
        self._least_context = max(self._least_context, context + 1)
        self._limited = True

    def refusal(self) -> HelixError:
        """Why there is none, not even a first one."""
        model, targets = self._call.public_model, self.way.targets
        if not targets:
            return HelixError(ErrorKind.UNAVAILABLE, f"The model '{model}' has no deployments.")
        targets = [target for target in targets if is_within(self._regions, target)]
        if not targets:
            where = " and ".join(repr(region) for region in sorted(self._regions))
            return HelixError(
                ErrorKind.PERMISSION_DENIED,
                f"This request must be served in the region {where}, and the model '{model}' is not served there.",
                param="model",
            )
        targets = [target for target in targets if self._is_affordable(target)]
        if not targets:
            return HelixError(
                ErrorKind.INVALID_REQUEST,
                f"The request could cost more than the model '{model}' allows: ask for fewer tokens (max_tokens).",
                param="max_tokens",
            )
        wait_s, kind = min(
            ((self._wait_s(target), _kind_of_wait(target)) for target in targets), key=lambda wait: wait[0]
        )
        return HelixError(kind, f"The model '{model}' is busy; try again later.", retry_after_s=wait_s)

    def _of_tier(self, tier: Tier) -> Target | None:
        targets, way = tier.targets, self.way
        if not self._tried and not self._limited and not way.by_cost:
            # Nearly always the first choice can be had; looking at all of them is dear.
            if len(targets) == 1:
                return targets[0] if self._wants_it(targets[0]) else None
            target = self._balancer.choose(targets, self._call, way.model, affinity=way.affinity, shares=tier.shares)
            if self._wants_it(target):
                return target
        able = [target for target in targets if self._may_have(target)]
        if len(able) <= 1:
            return able[0] if able else None
        if way.by_cost and self._cost_bound is not None:
            able = self._cheapest(able, self._cost_bound)
        shares = None if tier.shares is None else running_shares(able)
        return self._balancer.choose(able, self._call, way.model, affinity=way.affinity, shares=shares)

    def _cheapest(self, able: Sequence[Target], cost_bound: CostBound) -> list[Target]:
        """Those that charge the least among those that are free; when none is, all of them."""
        free = [target for target in able if target.in_flight < target.capacity]
        if not free:
            return list(able)
        costs = [cost_bound(target.deployment, self._call) for target in free]
        least = min(costs)
        return [target for target, cost in zip(free, costs, strict=True) if cost == least]

    def _of_ejected(self) -> Target | None:
        able = [
            target
            for target in self.way.targets
            if target.health.is_ejected
            and target not in self._tried
            and self._is_eligible(target)
            and not self._ceiling_wait_s(target)
        ]
        return min(able, key=lambda target: (target.tier, target.health.retry_after_s), default=None)

    def _may_have(self, target: Target) -> bool:
        return target not in self._tried and self._is_eligible(target) and self._wants_it(target)

    def _wants_it(self, target: Target) -> bool:
        """Whether the target takes calls now."""
        return not target.health.is_open and not (target.ceiling.is_active and self._ceiling_wait_s(target))

    def _is_eligible(self, target: Target) -> bool:
        return not self._limited or (
            is_within(self._regions, target) and target.context >= self._least_context and self._is_affordable(target)
        )

    def _is_affordable(self, target: Target) -> bool:
        """Whether it stays within `max_cost`, together with what others charge for the call already."""
        if self._max_cost is None or self._cost_bound is None:
            return True
        cost = self._cost(target.deployment, self._cost_bound)
        for side in self._call.progress.side_usage:
            cost += self._cost(side.deployment, self._cost_bound)
        return cost <= self._max_cost

    def _cost(self, deployment: str, cost_bound: CostBound) -> int:
        """At most, of an attempt that began when it was first asked for: what is left of the call's time is less now,
        what is charged for it is not.
        """
        cost = self._costs.get(deployment)
        if cost is None:
            cost = self._costs[deployment] = cost_bound(deployment, self._call)
        return cost

    def _ceiling_wait_s(self, target: Target) -> float:
        ceiling = target.ceiling
        return ceiling.wait_s(expected_tokens(self._call) if ceiling.counts_tokens else 0)

    def _wait_s(self, target: Target) -> float:
        return max(target.health.retry_after_s, self._ceiling_wait_s(target))

    def _context_needed(self) -> int:
        """Tokens that the prompt has at least; 0 when none of the targets has so many: one of them will say so best."""
        call = self._call
        size = call.body_bytes
        if isinstance(call.params, ChatParams):
            size -= call.params.media.inlined_bytes
        needed = size // _MOST_BYTES_A_TOKEN
        return needed if any(target.context >= needed for target in self.way.targets) else 0


def _kind_of_wait(target: Target) -> ErrorKind:
    return ErrorKind.OVERLOADED if target.health.retry_after_s else ErrorKind.RATE_LIMITED
