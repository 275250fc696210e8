"""What failures lead to, as arithmetic: how long a lock lasts, what is forgiven, how many may be tried at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.auth.failure_tally import (
    BY_ADDRESS,
    BY_EMAIL,
    FORGOTTEN_AFTER_S,
    HALVING_S,
    LONGEST_LOCK_S,
    Limit,
    Tally,
    lock_s,
)
from helixflow.auth.lockout import _site

NOON = 1_700_006_400 - 1_700_006_400 % HALVING_S
LIMITS = st.sampled_from([BY_EMAIL, BY_ADDRESS, Limit(1, halving=True)])


def test_locks_double_from_the_threshold_on_up_to_a_quarter_of_an_hour() -> None:
    for threshold in (BY_EMAIL.failures, BY_ADDRESS.failures):
        assert [lock_s(failures, threshold) for failures in range(threshold)] == [0] * threshold
        assert [lock_s(threshold + more, threshold) for more in range(10)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
        assert lock_s(threshold + 10, threshold) == lock_s(10**9, threshold) == LONGEST_LOCK_S


def test_failures_of_an_address_halve_at_each_full_hour() -> None:
    tally = Tally(BY_ADDRESS, 21, NOON + HALVING_S - 1)
    assert [tally.at(tally.counted_at + later).failures for later in (0, 1, HALVING_S, HALVING_S + 1)] == [
        21,
        10,
        10,
        5,
    ]


def test_failures_of_an_email_are_forgotten_a_day_after_the_last() -> None:
    tally = Tally(BY_EMAIL, 4, NOON).after_failure(NOON + FORGOTTEN_AFTER_S - 1)
    assert (tally.failures, tally.locked_until - tally.counted_at) == (5, 1)
    assert tally.at(tally.counted_at + FORGOTTEN_AFTER_S - 1).failures == 5
    assert tally.at(tally.counted_at + FORGOTTEN_AFTER_S).failures == 0


@given(limit=LIMITS, failures=st.integers(0, 60), steps=st.lists(st.integers(0, 3 * HALVING_S), max_size=12))
def test_looking_at_a_tally_of_an_address_in_between_changes_nothing(
    limit: Limit, failures: int, steps: list[int]
) -> None:
    looked_at = Tally(Limit(limit.failures, halving=True), failures, NOON)
    at_once = looked_at.at(NOON + sum(steps))
    now = NOON
    for step in steps:
        now += step
        looked_at = looked_at.at(now)
    assert looked_at == at_once


@given(
    limit=LIMITS,
    failures=st.integers(0, 40),
    events=st.lists(st.sampled_from(["begin", "fail", "succeed", "abandon"]), max_size=80),
)
def test_of_attempts_at_once_no_more_fail_than_the_limit_allows(limit: Limit, failures: int, events: list[str]) -> None:
    tally, under_way, abandoned, tried_wrong = Tally(limit, failures, NOON), 0, 0, 0
    allowed = max(1, limit.failures - failures)
    for event in events:
        if event == "begin":
            if tally.locked_until <= NOON and tally.admits(under_way, abandoned):
                under_way += 1
        elif under_way and event == "fail":
            under_way, tried_wrong = under_way - 1, tried_wrong + 1
            tally = tally.after_failure(NOON)
        elif under_way and event == "abandon":
            under_way, abandoned, tried_wrong = under_way - 1, abandoned + 1, tried_wrong + 1
        elif under_way and event == "succeed":
            # Without making up for a failure, which would rightly allow one more.
            under_way -= 1
        # Each one that was abandoned gives way to one more: it sets no lock until it is tidied up.
        assert tried_wrong + under_way <= allowed + abandoned


@given(limit=LIMITS, failures=st.integers(0, 40), wins=st.integers(0, 50))
def test_successes_make_up_for_failures_and_never_for_more(limit: Limit, failures: int, wins: int) -> None:
    tally = Tally(limit, failures, NOON, NOON + 5)
    for _ in range(wins):
        tally = tally.after_success(NOON)
    assert (tally.failures, tally.locked_until) == (max(0, failures - wins), NOON + 5)


@pytest.mark.parametrize(
    ("address", "site"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("not an address", "not an address"),
    ],
)
def test_whom_an_address_stands_for(address: str, site: str) -> None:
    assert _site(address) == site
