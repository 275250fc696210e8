"""Retries are a part of the requests, whatever happens."""

from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.clock import FakeClock
from helixflow.routing.retry_budget import WINDOW_S, RetryBudget
from helixflow.settings.serving import RoutingSettings


def make_budget(clock: FakeClock, percent: int, reserve: int) -> RetryBudget:
    return RetryBudget(RoutingSettings(retry_percent=percent, retry_reserve=reserve), clock)


def test_a_part_of_the_requests_and_a_reserve() -> None:
    clock = FakeClock()
    budget = make_budget(clock, 20, 2)
    assert [budget.try_retry() for _ in range(3)] == [True, True, False]
    for _ in range(10):
        budget.note_request()
    assert [budget.try_retry() for _ in range(3)] == [True, True, False]
    clock.advance(WINDOW_S)
    assert [budget.try_retry() for _ in range(3)] == [True, True, False], "what is long ago allows and forbids nothing"


def test_none_at_all_where_none_are_wanted() -> None:
    budget = make_budget(FakeClock(), 0, 0)
    for _ in range(1000):
        budget.note_request()
    assert not budget.try_retry()


@given(
    st.integers(0, 100),
    st.integers(0, 20),
    st.lists(st.tuples(st.floats(0, 4), st.integers(0, 30), st.integers(0, 30)), max_size=30),
)
def test_in_no_window_there_are_more(percent: int, reserve: int, steps: list[tuple[float, int, int]]) -> None:
    clock = FakeClock()
    budget = make_budget(clock, percent, reserve)
    requests: list[float] = []
    retries: list[float] = []
    for pause_s, asked, tried in steps:
        clock.advance(pause_s)
        now = clock.monotonic()
        for _ in range(asked):
            budget.note_request()
            requests.append(now)
        for _ in range(tried):
            begins = int(now) - WINDOW_S + 1
            allowed = percent * sum(at >= begins for at in requests) / 100 + reserve
            spent = sum(at >= begins for at in retries)
            assert budget.try_retry() is (spent + 1 <= allowed)
            if spent + 1 <= allowed:
                retries.append(now)
