"""What the policies of a caller are in Redis: reservations as the scripts want them, and their answers understood."""

import math
from collections.abc import Sequence
from typing import Final

from helixflow.core.call import Meter
from helixflow.metering.admission import Demand, Grant, Refusal
from helixflow.metering.policies import DAY_MS, Budget, Metric, Policies, Unit, period_bounds
from helixflow.metering.redis.keys import budget_place, epoch_key, parallel_place, rate_key
from helixflow.metering.spend import BudgetPeriod

# When to ask again for what running calls hold: they do not say when they end.
HELD_RETRY_S: Final = 1.0
# Counters of periods that are over are kept so long for calls that began in them.
_GRACE_MS: Final = 2 * DAY_MS

# Organisation, project and key of a call, and its admission (ms).
Whose = tuple[str, str, str, int]
Reservation = tuple[
    list[tuple[str, int, int, int, int, int]],
    tuple[tuple[str, int], ...],
    list[tuple[str, int, int, int, int]],
    int,
    Whose,
]


class PlannedBudget:
    """One budget in one period. `place` is where it is in every epoch, `forget_at_ms` 0 for one without end."""

    __slots__ = ("budget", "forget_at_ms", "is_money", "name", "period", "place")

    def __init__(self, budget: Budget, at_ms: int) -> None:
        from_ms, to_ms = period_bounds(budget.period, at_ms // DAY_MS)
        self.budget = budget
        self.period = BudgetPeriod(budget, from_ms, to_ms)
        self.name = self.period.counter
        self.place = budget_place(budget.organisation_id, self.name)
        self.forget_at_ms = to_ms + _GRACE_MS if to_ms else 0
        self.is_money = budget.unit is Unit.MONEY


class Plan:
    """The policies of a caller for calls admitted on one day, in the order charges, parallel limits, budgets."""

    __slots__ = (
        "_budget_parts",
        "_charge_parts",
        "_epoch",
        "_parallel_parts",
        "_static_holds",
        "budgets",
        "day",
        "parallels",
        "policies",
        "rates",
    )

    def __init__(self, policies: Policies, at_ms: int) -> None:
        self.policies = policies
        self.day = at_ms // DAY_MS
        self.rates = tuple(limit for limit in policies.limits if limit.metric is not Metric.PARALLEL_REQUESTS)
        self.parallels = tuple(limit for limit in policies.limits if limit.metric is Metric.PARALLEL_REQUESTS)
        self.budgets = tuple(PlannedBudget(budget, at_ms) for budget in policies.budgets)
        self._static_holds = tuple((f"l:{limit.id}", 1) for limit in self.parallels)
        self._charge_parts = tuple(
            (
                (rate_key(limit), max(limit.value, 1), limit.burst, limit.metric.window_s * 1_000_000),
                limit.metric is not Metric.REQUESTS_PER_MINUTE,
                f"l:{limit.id}",
            )
            for limit in self.rates
        )
        self._epoch = ""
        self._parallel_parts: tuple[tuple[str, int], ...] = ()
        self._budget_parts: tuple[tuple[str, bool, int, int], ...] = ()

    def holds(self, tokens: int, tokens_bound: int, cost_bound: int) -> tuple[tuple[str, int], ...]:
        """As they stand in the journal."""
        return (
            *[(name, tokens if of_tokens else 1) for _, of_tokens, name in self._charge_parts],
            *self._static_holds,
            *[(kept.name, cost_bound if kept.is_money else tokens_bound) for kept in self.budgets],
        )

    def reservation(
        self,
        epoch: str,
        tokens: int,
        tokens_bound: int,
        cost_bound: int,
        whose: Whose,
        *,
        charged: bool = True,
        restored: bool = False,
    ) -> Reservation:
        """As in common.lua. Not `charged`: its rates have not been taken from the ones there."""
        if epoch != self._epoch:
            self._bind(epoch)
        return (
            [(*part, tokens, 1) if of_tokens else (*part, 1, 0) for part, of_tokens, _ in self._charge_parts]
            if charged
            else [],
            self._parallel_parts,
            [
                (key, cost_bound, cap, 1, forget_at) if is_money else (key, tokens_bound, cap, 2, forget_at)
                for key, is_money, cap, forget_at in self._budget_parts
            ],
            1 if restored else 0,
            whose,
        )

    def grant(self, demand: Demand, answer: Sequence[int]) -> Grant:
        """What the script admit gave, status 0."""
        requests, tokens = self._tightest(answer, 2)
        return Grant(self.holds(demand.tokens, demand.tokens_bound, demand.cost_bound), requests, tokens)

    def leases_left(self, answer: Sequence[int]) -> list[tuple[str, int]]:
        """Places of budgets whose lease a grant has used, and what is left of it."""
        left = answer[1 + 2 * len(self.rates) :]
        return [(kept.place, amount) for kept, amount in zip(self.budgets, left, strict=True) if amount >= 0]

    def refusal(self, demand: Demand, answer: Sequence[int], now_s: float) -> Refusal:
        """Status 1. Of all that refuse the one that has room again last: who waits less would be refused by it."""
        refusals = list(self._refusing(demand, answer, now_s))
        refusal = max(refusals, key=_wait_s)
        refusal.requests, refusal.tokens = self._tightest(answer, 3)
        return refusal

    def _refusing(self, demand: Demand, answer: Sequence[int], now_s: float) -> list[Refusal]:
        refusals: list[Refusal] = []
        values = iter(answer[1:])
        for limit, (_, of_tokens, _) in zip(self.rates, self._charge_parts, strict=True):
            _left, _reset_us, wait_us = next(values), next(values), next(values)
            amount = demand.tokens if of_tokens else 1
            if wait_us:
                too_large = amount > limit.burst
                wait_s = None if too_large else wait_us / 1e6
                refusals.append(Refusal(limit=limit, retry_after_s=wait_s, too_large=too_large, requested=amount))
        for limit in self.parallels:
            if next(values) + 1 > limit.value:
                too_large = limit.value < 1
                wait_s = None if too_large else HELD_RETRY_S
                refusals.append(Refusal(limit=limit, retry_after_s=wait_s, too_large=too_large, requested=1))
        for kept in self.budgets:
            refuses, spent = next(values), next(values)
            if refuses:
                amount = demand.cost_bound if kept.is_money else demand.tokens_bound
                refusals.append(_refuse_budget(kept, amount, spent, now_s))
        return refusals

    def _tightest(self, answer: Sequence[int], stride: int) -> tuple[Meter | None, Meter | None]:
        """The meters of the limits of requests and of tokens that have least left."""
        requests: Meter | None = None
        tokens: Meter | None = None
        at = 1
        for limit, (_, of_tokens, _) in zip(self.rates, self._charge_parts, strict=True):
            left = answer[at]
            if of_tokens:
                if tokens is None or left < tokens.remaining:
                    tokens = Meter(limit.value, left, answer[at + 1] / 1e6)
            elif requests is None or left < requests.remaining:
                requests = Meter(limit.value, left, answer[at + 1] / 1e6)
            at += stride
        return requests, tokens

    def _bind(self, epoch: str) -> None:
        self._epoch = epoch
        self._parallel_parts = tuple((epoch_key(epoch, parallel_place(limit)), limit.value) for limit in self.parallels)
        self._budget_parts = tuple(
            (epoch_key(epoch, kept.place), kept.is_money, kept.budget.cap, kept.forget_at_ms) for kept in self.budgets
        )


def whose(demand: Demand) -> Whose:
    """What a reservation says of the call itself."""
    return demand.organisation_id, demand.project_id, demand.key_id, demand.admitted_at_ms


class Plans:
    """Plans by policies. The same policies are expected to be the same object, as the cache of policies gives them."""

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._plans: dict[int, Plan] = {}

    def find(self, policies: Policies, at_ms: int) -> Plan:
        # Each plan keeps its policies, so no other ones can have their id.
        plan = self._plans.get(id(policies))
        if plan is None or plan.day != at_ms // DAY_MS:
            if len(self._plans) >= self._size:
                self._plans.clear()
            plan = self._plans[id(policies)] = Plan(policies, at_ms)
        return plan


def _refuse_budget(kept: PlannedBudget, amount: int, spent: int, now_s: float) -> Refusal:
    budget = kept.budget
    too_large = amount > budget.cap
    wait_s: float | None = None
    if not too_large:
        if spent < budget.cap and spent + amount <= budget.cap:
            # Running calls have reserved the room, and rarely use all that they have reserved.
            wait_s = HELD_RETRY_S
        elif kept.period.to_ms:
            wait_s = max(kept.period.to_ms / 1000 - now_s, 0.0)
    return Refusal(budget=budget, retry_after_s=wait_s, too_large=too_large, requested=amount)


def _wait_s(refusal: Refusal) -> float:
    return math.inf if refusal.retry_after_s is None else refusal.retry_after_s
