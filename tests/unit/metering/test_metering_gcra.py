"""GCRA before references that keep every moment and count in fractions."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helixflow.metering.gcra import NEVER, Bucket

MINUTE_US, DAY_US = 60_000_000, 86_400_000_000

values = st.one_of(st.integers(1, 100), st.integers(1, 10**9))
windows = st.sampled_from([MINUTE_US, DAY_US])
bursts = st.one_of(st.integers(1, 20), st.integers(1, 10**9))
gaps = st.one_of(st.integers(0, 3), st.integers(0, MINUTE_US), st.integers(0, 2 * DAY_US))


@given(values, windows, st.integers(1, 12), st.lists(st.tuples(gaps, st.integers(0, 12)), max_size=40))
def test_a_call_is_admitted_just_when_no_stretch_of_time_gets_too_much(
    value: int, window_us: int, burst: int, calls: list[tuple[int, int]]
) -> None:
    bucket, rate, now = Bucket(value, window_us, burst), Fraction(value, window_us), 0
    admitted: list[tuple[int, int]] = []
    for gap, cost in calls:
        now += gap
        after = [*admitted, (now, cost)]
        fits = all(
            sum(each for _, each in after[first:]) <= burst + rate * (now - began)
            for first, (began, _) in enumerate(after)
        )
        assert bucket.take(now, cost) is fits
        if fits:
            admitted = after


@given(values, windows, st.integers(2, 1000), st.lists(st.fractions(0, 1), min_size=1, max_size=50))
def test_who_never_stops_asking_gets_burst_and_rate_to_the_unit(
    value: int, window_us: int, burst: int, pauses: list[Fraction]
) -> None:
    bucket, began, now, admitted = Bucket(value, window_us, burst), 12_345_678, 12_345_678, 0
    for pause in pauses:
        while bucket.take(now, 1):
            admitted += 1
        assert admitted == burst + (now - began) * value // window_us
        # So short that the bucket never runs over.
        now += int(pause * (burst - 1) * window_us / value)


class BucketMachine(RuleBasedStateMachine):
    """A bucket beside its level, an exact fraction."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.value, self.window_us, self.burst = 7, MINUTE_US, 5
        self.bucket = Bucket(self.value, self.window_us, self.burst)
        self.level = Fraction(self.burst)
        self.taken: list[int] = []

    @rule(gap=gaps)
    def wait(self, gap: int) -> None:
        self.now += gap
        self.level = min(Fraction(self.burst), self.level + Fraction(gap * self.value, self.window_us))

    @rule(cost=st.integers(0, 30))
    def take(self, cost: int) -> None:
        assert self.bucket.take(self.now, cost) is (cost <= self.level)
        if cost <= self.level:
            self.level -= cost
            self.taken.append(cost)

    @rule(cost=st.integers(1, 30))
    def owe(self, cost: int) -> None:
        self.bucket.owe(self.now, cost)
        self.level -= cost

    @precondition(lambda self: self.taken)
    @rule(part=st.fractions(0, 1))
    def give_back(self, part: Fraction) -> None:
        cost = int(self.taken.pop() * part)
        self.bucket.give_back(cost)
        self.level = min(Fraction(self.burst), self.level + cost)

    @rule(value=values, burst=bursts)
    def change(self, value: int, burst: int) -> None:
        self.bucket.change(self.now, value, burst)
        self.level += burst - self.burst
        self.value, self.burst = value, burst

    @rule(cost=st.integers(0, 30))
    def wait_as_told(self, cost: int) -> None:
        wait_us = self.bucket.wait_us(self.now, cost)
        if cost > self.burst:
            assert wait_us == NEVER
        elif cost <= self.level:
            assert wait_us == 0
        else:
            exact = (cost - self.level) * self.window_us / self.value
            assert wait_us - 1 < exact <= wait_us

    @invariant()
    def shows_what_is_left(self) -> None:
        meter = self.bucket.meter(self.now)
        assert meter.limit == self.value
        assert meter.remaining == max(self.level // 1, 0)
        exact_s = float((self.burst - self.level) * self.window_us / self.value / 1_000_000)
        assert abs(meter.reset_s - exact_s) <= 1e-9 * max(exact_s, 1)


TestBucket = BucketMachine.TestCase
TestBucket.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
