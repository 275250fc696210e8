"""Who is next, and that nobody is granted twice, forgotten or favoured."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helixflow.core.clock import FakeClock
from helixflow.routing.fair_queue import QUIET_S, RELIEF_EVERY, FairQueue, Refusal, Tenant, Waiting

LATER = 1e9


def queue(limit: int = 100, clock: FakeClock | None = None) -> FairQueue[str]:
    return FairQueue(clock or FakeClock(), limit=limit)


def offer(fair: FairQueue[str], tenant: Tenant, item: str = "", *, estimate: int = 0, priority: int = 0,
          deadline: float = LATER) -> Waiting[str]:  # fmt: skip
    answer = fair.offer(tenant, item, estimate=estimate, priority=priority, deadline=deadline)
    assert isinstance(answer, Waiting)
    return answer


def taken(fair: FairQueue[str]) -> str:
    waiting = fair.take()
    assert waiting is not None
    return waiting.item


def test_one_keys_requests_are_served_in_the_order_of_their_coming() -> None:
    fair = queue()
    for number in range(5):
        offer(fair, Tenant("o", "k"), str(number))
    assert [taken(fair) for _ in range(5)] == ["0", "1", "2", "3", "4"]
    assert fair.take() is None


@pytest.mark.parametrize(("weights", "expected"), [((100, 100), (50, 50)), ((300, 100), (75, 25)), ((1, 9), (10, 90))])
def test_organisations_get_tokens_by_weight(weights: tuple[int, int], expected: tuple[int, int]) -> None:
    fair = queue(400)
    tenants = [Tenant(name, "k", weight) for name, weight in zip("ab", weights, strict=True)]
    for tenant in tenants:
        for _ in range(100):
            offer(fair, tenant, tenant.organisation, estimate=10)
    served = Counter(taken(fair) for _ in range(100))
    assert abs(served["a"] - expected[0]) <= 1
    assert abs(served["b"] - expected[1]) <= 1


def test_many_keys_do_not_get_an_organisation_more_than_one_key_does() -> None:
    fair = queue(400)
    for number in range(100):
        offer(fair, Tenant("many", f"k{number}"), "many", estimate=10)
        offer(fair, Tenant("one", "k"), "one", estimate=10)
    assert Counter(taken(fair) for _ in range(60)) == {"many": 30, "one": 30}


def test_keys_share_what_their_organisation_gets_by_weight() -> None:
    fair = queue(400)
    for _ in range(100):
        offer(fair, Tenant("o", "heavy", 100, 300), "heavy", estimate=10)
        offer(fair, Tenant("o", "light", 100, 100), "light", estimate=10)
    assert Counter(taken(fair) for _ in range(80)) == {"heavy": 60, "light": 20}


def test_what_is_used_counts_and_not_how_many_requests_there_are() -> None:
    fair = queue(400)
    long, short = Tenant("long", "k"), Tenant("short", "k")
    for _ in range(100):
        offer(fair, long, "long")
        offer(fair, short, "short")
    served = Counter[str]()
    for _ in range(110):
        name = taken(fair)
        served[name] += 1
        fair.charge(long if name == "long" else short, 1000 if name == "long" else 100)
    assert served["long"] == pytest.approx(10, abs=1)


def test_an_estimate_that_was_too_high_is_given_back() -> None:
    fair = queue()
    for _ in range(4):
        offer(fair, Tenant("a", "k"), "a", estimate=1000)
        offer(fair, Tenant("b", "k"), "b", estimate=10)
    assert [taken(fair), taken(fair)] == ["a", "b"]
    fair.charge(Tenant("a", "k"), -1000, settled=1000)
    assert taken(fair) == "a"
    assert [taken(fair) for _ in range(3)] == ["b", "b", "b"]


def test_who_was_idle_has_no_credit_for_it() -> None:
    fair = queue(400)
    for _ in range(100):
        offer(fair, Tenant("busy", "k"), "busy", estimate=10)
    for _ in range(50):
        taken(fair)
        fair.charge(Tenant("busy", "k"), 0, settled=10)
    for _ in range(50):
        offer(fair, Tenant("back", "k"), "back", estimate=10)
    served = Counter(taken(fair) for _ in range(40))
    assert abs(served["back"] - served["busy"]) <= 2


def test_who_comes_rarely_does_not_wait_behind_a_flood() -> None:
    fair = queue(1000)
    for _ in range(200):
        offer(fair, Tenant("flood", "k"), "flood", estimate=100)
    for _ in range(10):
        for _ in range(5):
            taken(fair)
        offer(fair, Tenant("rare", "k"), "rare", estimate=100)
        assert "rare" in {taken(fair), taken(fair)}


def test_higher_priorities_come_first_and_lower_ones_never_stand_still() -> None:
    fair = queue(1000)
    for _ in range(200):
        offer(fair, Tenant("high", "k"), "high", priority=5)
    for _ in range(20):
        offer(fair, Tenant("low", "k"), "low", priority=0)
        offer(fair, Tenant("lowest", "k"), "lowest", priority=-5)
    served = [taken(fair) for _ in range(4 * RELIEF_EVERY)]
    assert served.count("high") == len(served) - 4
    assert (served.count("low"), served.count("lowest")) == (2, 2)


def test_who_cannot_be_used_is_passed_over_and_keeps_its_place() -> None:
    fair = queue()
    for name in ("first", "second", "third"):
        offer(fair, Tenant(name, "k"), name, estimate=1)
    waiting = fair.take(lambda item: item != "first")
    assert waiting is not None
    assert waiting.item == "second"
    assert fair.take(lambda item: False) is None
    assert [taken(fair), taken(fair)] == ["first", "third"]


def test_a_full_queue_refuses() -> None:
    fair = queue(1)
    offer(fair, Tenant("o", "k"))
    answer = fair.offer(Tenant("p", "k"), "", deadline=LATER)
    assert isinstance(answer, Refusal)
    assert answer.queue_full
    assert answer.retry_after_s >= 1


def test_a_wait_beyond_the_deadline_is_refused_at_once_with_the_time_when_it_would_not_be() -> None:
    clock = FakeClock()
    fair = queue(clock=clock)
    fair.slots = 2
    fair.note_held(40.0, 4)
    for _ in range(8):
        offer(fair, Tenant("o", "k"))
    answer = fair.offer(Tenant("o", "k"), "", deadline=clock.monotonic() + 30)
    assert answer == Refusal(pytest.approx((8 + 1) * 10 / 2 - 30), queue_full=False)
    # Another organisation's turn comes sooner.
    assert isinstance(fair.offer(Tenant("p", "k"), "", deadline=clock.monotonic() + 30), Waiting)


def test_who_is_past_its_deadline_is_not_served() -> None:
    clock = FakeClock()
    fair = queue(clock=clock)
    offer(fair, Tenant("o", "k"), "late", deadline=clock.monotonic() + 1)
    offer(fair, Tenant("o", "k"), "in time", deadline=clock.monotonic() + 3)
    clock.advance(2)
    assert taken(fair) == "in time"
    assert len(fair) == 0


def test_counters_are_forgotten_when_nobody_has_waited_for_a_while() -> None:
    clock = FakeClock()
    fair = queue(clock=clock)
    offer(fair, Tenant("a", "k"), "a", estimate=1000)
    taken(fair)
    assert fair.counters == 1
    clock.advance(QUIET_S)
    fair.charge(Tenant("a", "k"), 500)
    assert fair.counters == 0


def test_a_stream_of_ever_new_tenants_takes_bounded_memory() -> None:
    fair = queue(100_000)
    for number in range(10_000):
        offer(fair, Tenant(f"o{number}", "k"), estimate=number % 7)
        offer(fair, Tenant("o", f"k{number}"), estimate=number % 5)
        fair.take()
        fair.take()
    assert fair.counters < 5_000


def test_counters_can_be_carried_to_another_queue() -> None:
    here, there = queue(), queue()
    a, b = Tenant("a", "k"), Tenant("b", "k")
    for tenant in (a, b):
        offer(here, tenant)
    here.charge(a, 5000)
    for tenant in (a, b):
        there.preset(tenant, here.standing(tenant))
        offer(there, tenant, tenant.organisation)
    assert taken(there) == "b"


class Fairness(RuleBasedStateMachine):
    """Requests of a few tenants come, leave, are served and use tokens; the queue is compared with a list."""

    @initialize(
        weights=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
        keys=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
        limit=st.integers(1, 40),
    )
    def begin(self, weights: list[int], keys: list[int], limit: int) -> None:
        self.clock = FakeClock()
        self.fair: FairQueue[int] = FairQueue(self.clock, limit=limit)
        self.limit = limit
        self.tenants = [Tenant(f"o{index % 2}", f"k{index}", weights[index % 2], keys[index]) for index in range(4)]
        self.waiting: dict[int, Waiting[int]] = {}
        self.granted: set[int] = set()
        self.gone: set[int] = set()
        self.last = 0

    @rule(tenant=st.integers(0, 3), priority=st.integers(0, 2), estimate=st.integers(0, 100), left=st.floats(0, 50))
    def come(self, tenant: int, priority: int, estimate: int, left: float) -> None:
        self.last += 1
        answer = self.fair.offer(
            self.tenants[tenant],
            self.last,
            priority=priority,
            estimate=estimate,
            deadline=self.clock.monotonic() + left,
        )
        if isinstance(answer, Refusal):
            assert len(self.waiting) >= self.limit
        else:
            assert len(self.waiting) < self.limit
            self.waiting[self.last] = answer

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.waiting)))
        waiting = self.waiting.pop(number)
        assert self.fair.cancel(waiting)
        assert not self.fair.cancel(waiting)
        self.gone.add(number)

    @rule(odd=st.booleans(), choosy=st.booleans())
    def serve(self, odd: bool, choosy: bool) -> None:
        usable = (lambda number: number % 2 == odd) if choosy else None
        waiting = self.fair.take(usable)
        now = self.clock.monotonic()
        live = [one for one in self.waiting.values() if one.deadline >= now and (usable is None or usable(one.item))]
        if waiting is None:
            assert not live  # it conserves work
        else:
            assert waiting in live
            assert waiting.item not in self.granted | self.gone
            assert usable is None or usable(waiting.item)
            same = [one for one in live if (one.tenant, one.priority) == (waiting.tenant, waiting.priority)]
            assert waiting.item == min(one.item for one in same)
            self.granted.add(waiting.item)
            del self.waiting[waiting.item]
        still = set(self.fair)
        for number, one in list(self.waiting.items()):
            if one not in still:
                assert one.deadline < now
                del self.waiting[number]

    @rule(tenant=st.integers(0, 3), tokens=st.integers(-100, 1000), settled=st.integers(0, 100))
    def use(self, tenant: int, tokens: int, settled: int) -> None:
        self.fair.charge(self.tenants[tenant], tokens, settled)

    @rule(seconds=st.floats(0, 5))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def nobody_is_lost(self) -> None:
        if hasattr(self, "fair"):
            assert len(self.fair) == len(self.waiting)
            assert set(self.fair) == set(self.waiting.values())
            assert self.fair.counters <= 4


TestFairness = Fairness.TestCase
TestFairness.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 100), min_size=2, max_size=5),
    costs=st.lists(st.integers(1, 200), min_size=5, max_size=5),
)
def test_shares_stay_within_one_request_of_the_weights(weights: list[int], costs: list[int]) -> None:
    fair: FairQueue[int] = FairQueue(FakeClock(), limit=10_000)
    tenants = [Tenant(f"o{index}", "k", weight) for index, weight in enumerate(weights)]
    for index, tenant in enumerate(tenants):
        for _ in range(200):
            fair.offer(tenant, index, estimate=costs[index], deadline=LATER)
    used = [0.0] * len(tenants)
    for _ in range(200):
        waiting = fair.take()
        assert waiting is not None
        used[waiting.item] += costs[waiting.item] / weights[waiting.item]
        most = max(cost / weight for cost, weight in zip(costs, weights, strict=False))
        assert max(used) - min(used) <= most + 1e-6
