"""When a target is left alone, and who finds out whether it serves again."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helixflow.core.clock import FakeClock
from helixflow.routing.health import Health
from helixflow.settings.serving import RoutingSettings

FAILURES, FIRST_S, LONGEST_S = 3, 1.0, 8.0
ROUTING = RoutingSettings(ejection_failures=FAILURES, ejection_s=FIRST_S, ejection_max_s=LONGEST_S)


def make_health(clock: FakeClock, *, random: float = 0.0) -> Health:
    return Health(ROUTING, clock, random_unit=lambda: random)


def fail(health: Health, times: int = 1) -> None:
    for _ in range(times):
        health.fail(health.begin())


def test_pauses_grow_to_a_bound_and_one_trial_decides() -> None:
    clock = FakeClock()
    health = make_health(clock)
    fail(health, FAILURES - 1)
    assert not health.is_open
    fail(health)
    pause_s = FIRST_S
    for _ in range(6):
        assert health.is_open
        assert health.retry_after_s == pause_s
        clock.advance(pause_s)
        assert not health.is_open
        trial = health.begin()
        assert health.is_open, "one at a time"
        health.fail(trial)
        pause_s = min(pause_s * 2, LONGEST_S)
    clock.advance(pause_s)
    health.abandon(health.begin())
    assert not health.is_open, "that said nothing: the next one may try"
    health.succeed(health.begin(), 0.1)
    fail(health, FAILURES - 1)
    assert not health.is_open


def test_who_has_had_its_rest_is_as_before() -> None:
    clock = FakeClock()
    health = make_health(clock)
    health.abandon(health.begin(), retry_after_s=20)
    health.succeed(health.begin(), 0.1)
    assert health.is_open and not health.is_untroubled, "a call that was under way does not shorten it"
    clock.advance(20)
    assert not health.is_open
    health.succeed(health.begin(), 0.1, whole=True)
    assert health.is_untroubled


def test_a_pause_is_jittered() -> None:
    health = make_health(FakeClock(), random=1.0)
    fail(health, FAILURES)
    assert FIRST_S < health.retry_after_s < FIRST_S * 1.2


def test_who_comes_back_only_to_fail_again_is_left_alone_for_longer() -> None:
    clock = FakeClock()
    health = make_health(clock)
    fail(health, FAILURES)
    clock.advance(FIRST_S)
    health.succeed(health.begin(), 0.1)
    fail(health, FAILURES)
    assert health.retry_after_s == 2 * FIRST_S
    clock.advance(2 * FIRST_S)
    health.succeed(health.begin(), 0.1)
    clock.advance(LONGEST_S)
    fail(health, FAILURES)
    assert health.retry_after_s == FIRST_S, "a good while lets that be forgotten"


def test_failures_of_calls_that_were_under_way_are_one_ejection() -> None:
    clock = FakeClock()
    health = make_health(clock)
    turns = [health.begin() for _ in range(50)]
    for turn in turns:
        health.fail(turn)
    assert health.retry_after_s == FIRST_S
    health.succeed(turns[0], 0.1)
    assert health.is_open, "nor does an old success say that it serves again"


def test_a_call_for_which_nothing_better_was_left_brings_it_back() -> None:
    clock = FakeClock()
    health = make_health(clock)
    fail(health, FAILURES)
    turn = health.begin()
    assert health.is_open
    health.fail(turn)
    assert health.retry_after_s == FIRST_S
    health.succeed(health.begin(), 0.1)
    assert not health.is_open


def test_streams_that_break_off_count_though_they_began_well() -> None:
    clock = FakeClock()
    health = make_health(clock)
    for number in range(FAILURES):
        assert not health.is_open, number
        turn = health.begin()
        health.succeed(turn, 0.1)
        health.break_off(turn)
    assert health.is_open
    clock.advance(FIRST_S)
    trial = health.begin()
    health.succeed(trial, 0.1)
    assert not health.is_open
    health.break_off(trial)
    assert health.is_open, "it has not brought one to its end since"
    assert health.retry_after_s == 2 * FIRST_S
    clock.advance(2 * FIRST_S)
    health.succeed(health.begin(), 0.1)
    health.finish()
    turn = health.begin()
    health.succeed(turn, 0.1)
    health.break_off(turn)
    assert not health.is_open


@pytest.mark.parametrize("blamed", [True, False])
def test_who_wants_to_be_left_alone_is(blamed: bool) -> None:
    clock = FakeClock()
    health = make_health(clock)
    turn = health.begin()
    if blamed:
        health.fail(turn, retry_after_s=20)
    else:
        health.abandon(turn, retry_after_s=20)
    assert health.is_open
    assert health.retry_after_s == 20
    assert not health.is_ejected
    clock.advance(20)
    assert not health.is_open
    fail(health, FAILURES - 1 - blamed)
    assert not health.is_open
    fail(health)
    assert health.is_ejected


def test_a_probe_brings_the_trial_forward_but_does_not_replace_it() -> None:
    clock = FakeClock()
    health = make_health(clock)
    fail(health, FAILURES)
    health.probed(well=True)
    assert not health.is_open
    assert health.is_ejected
    health.begin()
    assert health.is_open
    resting = make_health(clock)
    fail(resting, FAILURES)
    resting.abandon(resting.begin(), retry_after_s=20)
    resting.probed(well=True)
    assert resting.retry_after_s == 20, "it has said so itself"


def test_probes_that_fail_take_an_idle_target_out_and_keep_it_out() -> None:
    clock = FakeClock()
    health = make_health(clock)
    for _ in range(FAILURES - 1):
        health.probed(well=False)
    health.probed(well=True)
    for _ in range(FAILURES - 1):
        health.probed(well=False)
    assert not health.is_open
    health.probed(well=False)
    assert health.is_open
    clock.advance(FIRST_S)
    health.probed(well=False)
    assert health.retry_after_s == 2 * FIRST_S, "no call was spent on it"


class HealthModel(RuleBasedStateMachine):
    """Calls that begin and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.health = make_health(self.clock, random=0.5)
        self.open: list[int] = []
        self.streams: list[int] = []
        self.trials = 0
        self.rests_until = 0.0

    @rule()
    def begin(self) -> None:
        was_closed = not self.health.is_open
        turn = self.health.begin()
        if turn < 0:
            assert was_closed, "a trial is let through only when the target is to be tried"
        self.open.append(turn)

    def _end(self, data: st.DataObject) -> int:
        return self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        turn = self._end(data)
        self.health.succeed(turn, 0.5)
        self.streams.append(turn)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), retry_after_s=st.none() | st.floats(0, 5))
    def fail(self, data: st.DataObject, retry_after_s: float | None) -> None:
        self.health.fail(self._end(data), retry_after_s=retry_after_s)
        self.rests_until = max(self.rests_until, self.clock.monotonic() + (retry_after_s or 0))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        self.health.abandon(self._end(data))

    @precondition(lambda self: self.streams)
    @rule(well=st.booleans())
    def end_stream(self, well: bool) -> None:
        turn = self.streams.pop()
        if well:
            self.health.finish()
        else:
            self.health.break_off(turn)

    @rule(seconds=st.floats(0, 2 * LONGEST_S))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(well=st.booleans())
    def probe(self, well: bool) -> None:
        self.health.probed(well=well)

    @rule()
    def eject(self) -> None:
        if not self.health.is_ejected:
            self.health.eject()

    @invariant()
    def one_trial_at_a_time(self) -> None:
        trials = [turn for turn in self.open if self.health.is_trial(turn)]
        assert len(trials) <= 1
        if trials:
            assert self.health.is_open

    @invariant()
    def it_is_never_left_alone_for_ever(self) -> None:
        longest = max(LONGEST_S * 1.1, self.rests_until - self.clock.monotonic())
        assert self.health.retry_after_s <= longest + 1e-6

    def teardown(self) -> None:
        """Once all calls have ended, however, somebody is let through and can bring it back."""
        for turn in self.open:
            self.health.abandon(turn)
        self.clock.advance(self.health.retry_after_s)
        assert not self.health.is_open
        self.health.succeed(self.health.begin(), 0.1)
        assert not self.health.is_open
        assert not self.health.is_ejected


TestHealthModel = HealthModel.TestCase
TestHealthModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
