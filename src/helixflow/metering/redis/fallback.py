"""What a gateway decides while Redis is away: its share of each limit, and of budgets only what it has leased."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Final

from helixflow.metering.admission import Demand, Grant, Refusal
from helixflow.metering.gcra import NEVER, Bucket
from helixflow.metering.policies import Limit, Metric
from helixflow.metering.redis.calls import OpenCall, Whereabouts
from helixflow.metering.redis.leases import Leases
from helixflow.metering.redis.plan import HELD_RETRY_S, Plan, whose

# Among the holds of a call that was granted without Redis: the generation of this gateway that Redis knows. Who closes
# its journal sees by that whether Redis has been told of the call.
LEASE_HOLD: Final = "lease"


class Fallback:
    """One outage's counters. `calls` are all that this gateway has open; `gateways` share each limit evenly."""

    def __init__(self, gateways: int, leases: Leases, calls: Callable[[], Collection[OpenCall]]) -> None:
        self._gateways = gateways
        self._leases = leases
        self._calls = calls
        self._buckets: dict[str, Bucket] = {}
        # Running calls by parallel limit; None until somebody asks.
        self._running: Counter[str] | None = None

    def admit(self, plan: Plan, demand: Demand, now: float, generation: int) -> tuple[Grant, OpenCall]:
        """Raises `Refusal`. `now` is on the event loop's clock."""
        now_us = int(now * 1e6)
        charges = [self._check_rate(limit, demand, now_us) for limit in plan.rates]
        for limit in plan.parallels:
            if self._count()[limit.id] >= self._share(limit.value):
                raise Refusal(limit=limit, retry_after_s=HELD_RETRY_S if limit.value else None, requested=1)
        for kept in plan.budgets:
            amount = demand.cost_bound if kept.is_money else demand.tokens_bound
            # As in Redis: what costs nothing does not fit either once nothing is left.
            if max(amount, 1) > self._leases.room(kept.place):
                raise Refusal(budget=kept.budget, retry_after_s=HELD_RETRY_S, requested=amount)
        for bucket, amount in charges:
            bucket.take(now_us, amount)
        if plan.parallels:
            self._count().update(limit.id for limit in plan.parallels)
        for kept in plan.budgets:
            self._leases.take(kept.place, demand.cost_bound if kept.is_money else demand.tokens_bound)
        call = OpenCall(
            plan,
            demand.tokens,
            demand.tokens_bound,
            demand.cost_bound,
            whose(demand),
            Whereabouts.HERE,
            tuple(charges),
            charged=False,
        )
        holds = plan.holds(demand.tokens, demand.tokens_bound, demand.cost_bound)
        return Grant((*holds, (LEASE_HOLD, generation)) if plan.budgets else holds), call

    def end(self, call: OpenCall, now: float, tokens: int) -> None:
        """A call has ended, wherever it was granted; `tokens` below 0: it has never been."""
        for (bucket, amount), limit in zip(call.charges, call.plan.rates, strict=False):
            if tokens < 0:
                bucket.give_back(amount)
            elif limit.metric is not Metric.REQUESTS_PER_MINUTE:
                bucket.give_back(amount)
                bucket.owe(int(now * 1e6), tokens)
        if self._running is not None:
            self._running.subtract(limit.id for limit in call.plan.parallels)

    def clear(self) -> None:
        """The outage is over."""
        self._buckets.clear()
        self._running = None

    def _check_rate(self, limit: Limit, demand: Demand, now_us: int) -> tuple[Bucket, int]:
        value, burst = self._share(limit.value), self._share(limit.burst)
        bucket = self._buckets.get(limit.id)
        if bucket is None:
            bucket = self._buckets[limit.id] = Bucket(max(value, 1), limit.metric.window_s * 1_000_000, burst)
        elif bucket.value != max(value, 1) or bucket.burst != burst:
            bucket.change(now_us, max(value, 1), burst)
        amount = 1 if limit.metric is Metric.REQUESTS_PER_MINUTE else demand.tokens
        # What fits the limit is not too large for a share of it.
        charged = min(amount, burst) if amount <= limit.burst else amount
        wait_us = bucket.wait_us(now_us, charged)
        if wait_us:
            never = wait_us == NEVER
            raise Refusal(
                limit=limit, retry_after_s=None if never else wait_us / 1e6, too_large=never, requested=amount
            )
        return bucket, charged

    def _count(self) -> Counter[str]:
        """Of all calls that run, wherever they were granted."""
        if self._running is None:
            self._running = Counter(limit.id for call in self._calls() for limit in call.plan.parallels)
        return self._running

    def _share(self, value: int) -> int:
        return max(value // self._gateways, 1) if value else 0
