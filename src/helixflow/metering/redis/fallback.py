"""What a gateway decides while Redis is away: its share of each limit, and of budgets only what it has leased."""

from collections.abc import Callable, Collection
from dataclasses import replace

from helixflow.metering.admission import Demand, Grant, Refusal
from helixflow.metering.counters import LimitCounter, limit_counter
from helixflow.metering.gcra import NEVER, REFUSED
from helixflow.metering.policies import Limit, Metric
from helixflow.metering.redis.calls import OpenCall, Whereabouts
from helixflow.metering.redis.leases import Leases
from helixflow.metering.redis.plan import HELD_RETRY_S, Plan

# Among the holds of a call that was admitted without Redis: under which generation of this gateway. Who closes its
# journal sees by that whether Redis has been told of the call.
LEASE_HOLD = "lease"


class Fallback:
    """One outage's counters. `calls` are all that this gateway has open; `gateways` share each limit evenly."""

    def __init__(self, gateways: int, leases: Leases, calls: Callable[[], Collection[OpenCall]]) -> None:
        self._gateways = gateways
        self._leases = leases
        self._calls = calls
        self._counters: dict[str, LimitCounter] = {}

    def admit(self, plan: Plan, demand: Demand, now: float, generation: int) -> tuple[Grant, OpenCall]:
        """Raises `Refusal`. `now` is on the event loop's clock."""
        now_us = int(now * 1e6)
        taken: list[tuple[LimitCounter, int, int]] = []
        for limit in plan.policies.limits:
            counter = self._counter(limit, now_us)
            amount = 1
            if limit.metric in (Metric.TOKENS_PER_MINUTE, Metric.TOKENS_PER_DAY):
                # What fits the limit must not be too large for a share of it.
                amount = min(demand.tokens, counter.burst) if demand.tokens <= limit.burst else demand.tokens
            state = counter.after(now_us, amount)
            if state == REFUSED:
                wait_us = counter.wait_us(now_us, amount)
                too_large = wait_us == NEVER
                wait_s = None if too_large else wait_us / 1e6
                raise Refusal(limit=limit, retry_after_s=wait_s, too_large=too_large, requested=amount)
            taken.append((counter, state, amount))
        for kept in plan.budgets:
            amount = demand.cost_bound if kept.is_money else demand.tokens_bound
            # Nothing left is no leave to make calls that cost nothing, as it is not in Redis.
            if max(amount, 1) > self._leases.room(kept.place):
                raise Refusal(budget=kept.budget, retry_after_s=HELD_RETRY_S, requested=amount)
        for counter, state, _ in taken:
            counter.state = state
            counter.held += 1
        for kept in plan.budgets:
            self._leases.take(kept.place, demand.cost_bound if kept.is_money else demand.tokens_bound)
        holds = plan.holds(demand.tokens, demand.tokens_bound, demand.cost_bound)
        rates = tuple(
            (counter, amount)
            for (counter, _, amount), limit in zip(taken, plan.policies.limits, strict=True)
            if limit.metric is not Metric.PARALLEL_REQUESTS
        )
        call = OpenCall(
            plan, demand.tokens, demand.tokens_bound, demand.cost_bound, Whereabouts.HERE, rates, charged=False
        )
        return Grant((*holds, (LEASE_HOLD, generation))), call

    def end(self, call: OpenCall, now: float, tokens: int) -> None:
        """A call has ended, wherever it was granted; `tokens` below 0: it has never been."""
        now_us = int(now * 1e6)
        for counter, amount in call.charges:
            if tokens < 0:
                counter.release(amount)
            else:
                counter.settle(now_us, amount, tokens)
        for limit in call.plan.parallels:
            parallel = self._counters.get(limit.id)
            if parallel is not None:
                parallel.release(1)

    def clear(self) -> None:
        """The outage is over."""
        self._counters.clear()

    def _counter(self, limit: Limit, now_us: int) -> LimitCounter:
        share = replace(limit, value=_share(limit.value, self._gateways), burst=_share(limit.burst, self._gateways))
        counter = self._counters.get(limit.id)
        if counter is None:
            counter = self._counters[limit.id] = limit_counter(share)
            if limit.metric is Metric.PARALLEL_REQUESTS:
                counter.state = counter.held = sum(
                    1 for call in self._calls() for other in call.plan.parallels if other.id == limit.id
                )
        elif counter.value != share.value or counter.burst != share.burst:
            counter.adopt(share, now_us)
        return counter


def _share(value: int, gateways: int) -> int:
    return max(value // gateways, 1) if value else 0
