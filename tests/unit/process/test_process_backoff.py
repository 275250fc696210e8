import pytest

from helixflow.process.backoff import Backoff, CrashLoop


def test_delays_double_up_to_the_maximum() -> None:
    backoff = Backoff(initial_s=0.5, maximum_s=30, jitter=0)
    assert [backoff.next_delay_s(0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_jitter_only_shortens() -> None:
    backoff = Backoff(initial_s=4, jitter=0.25, random_unit=lambda: 1.0)
    assert backoff.next_delay_s(0) == pytest.approx(3.0)


def test_a_healthy_minute_starts_the_row_anew() -> None:
    backoff = Backoff(initial_s=1, jitter=0, reset_after_s=60)
    assert [backoff.next_delay_s(0), backoff.next_delay_s(59), backoff.next_delay_s(60)] == [1, 2, 1]


def test_who_has_served_is_not_left_out_for_longer_than_a_tenth_of_it() -> None:
    backoff = Backoff(initial_s=0.5, jitter=0)
    for _ in range(9):
        backoff.next_delay_s(0)
    assert [backoff.next_delay_s(served_s) for served_s in (20, 0, 1, 8, 5, 0)] == [2, 4, 8, 0.8, 1, 2]


def test_many_failures_do_not_overflow() -> None:
    backoff = Backoff(jitter=0)
    assert [backoff.next_delay_s(0) for _ in range(5000)][-1] == 30


def test_crash_loop_counts_only_the_window() -> None:
    loop = CrashLoop(limit=5, window_s=60)
    assert [loop.record_exit(at) for at in (0, 20, 40, 60, 80, 81, 82)] == [False] * 6 + [True]


def test_five_exits_in_a_minute_are_a_crash_loop() -> None:
    loop = CrashLoop(limit=5, window_s=60)
    assert [loop.record_exit(at) for at in (1, 2, 3, 4, 61)] == [False, False, False, False, True]
