"""What providers say of their limits in their heads, or pretend to."""

import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.capacity import ProviderLimits
from helixflow.engines.provider_limits import read_limits

OPENAI = {
    b"x-ratelimit-limit-requests": b"60",
    b"x-ratelimit-remaining-requests": b"9",
    b"x-ratelimit-reset-requests": b"1s",
    b"x-ratelimit-limit-tokens": b"150000",
    b"x-ratelimit-remaining-tokens": b"1000",
    b"x-ratelimit-reset-tokens": b"6m0s",
}


def read(headers: dict[bytes, bytes]) -> ProviderLimits:
    limits = ProviderLimits()
    read_limits(headers, limits)
    return limits


def test_openai_says_what_is_left_and_when_all_is_there_again() -> None:
    limits = read(OPENAI)
    assert (limits.requests_left, limits.requests_a_second) == (9, 51)
    assert (limits.tokens_left, limits.tokens_a_second) == (1000, pytest.approx(149_000 / 360))
    assert 0 <= time.monotonic() - limits.requests_at < 60
    assert limits.are_known and not read({b"server": b"some"}).are_known


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(b"20ms", 0.02), (b"1.5s", 1.5), (b"1m30s", 90), (b"1h", 600), (b"6m", 360), (b"2m5ms", 120.005)],
)
def test_durations(text: bytes, seconds: float) -> None:
    limits = read({**OPENAI, b"x-ratelimit-reset-requests": text})
    assert limits.requests_a_second == pytest.approx(51 / seconds)


def test_who_has_plenty_left_is_not_read_closely() -> None:
    limits = read({**OPENAI, b"x-ratelimit-remaining-requests": b"59", b"x-ratelimit-reset-requests": b"nonsense"})
    assert (limits.requests_left, limits.requests_a_second) == (59, 1)


def test_anthropic_says_it_by_the_clock() -> None:
    moment = datetime.fromtimestamp(time.time() + 100, UTC)
    for form in ("%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S+00:00"):
        limits = read(
            {
                b"anthropic-ratelimit-requests-limit": b"50",
                b"anthropic-ratelimit-requests-remaining": b"0",
                b"anthropic-ratelimit-requests-reset": moment.strftime(form).encode(),
            }
        )
        assert limits.requests_left == 0
        assert limits.requests_a_second == pytest.approx(0.5, rel=0.05)
        assert limits.tokens_left == float("inf")


def test_who_says_nothing_has_no_limits() -> None:
    limits = read({b"content-type": b"application/json"})
    assert limits.requests_left == limits.tokens_left == float("inf")


def test_what_cannot_be_understood_changes_nothing() -> None:
    limits = read(OPENAI)
    read_limits({b"x-ratelimit-remaining-requests": b"-1", b"x-ratelimit-remaining-tokens": b"9" * 5000}, limits)
    assert (limits.requests_left, limits.tokens_left) == (9, 1000)
    read_limits({**OPENAI, b"x-ratelimit-reset-requests": b"soon", b"x-ratelimit-limit-tokens": b""}, limits)
    assert limits.requests_a_second == limits.tokens_a_second == 0


values = st.binary(max_size=20) | st.sampled_from([b"0", b"1", b"1s", b"0s", b"99999999h", b"2026-01-01T00:00:00Z"])
names = [*OPENAI, *(b"anthropic-ratelimit-requests-" + part for part in (b"limit", b"remaining", b"reset"))]


@given(st.dictionaries(st.sampled_from(names), values))
def test_whatever_it_says_it_is_asked_again_within_ten_minutes(headers: dict[bytes, bytes]) -> None:
    limits = read(headers)
    for left, a_second in (
        (limits.requests_left, limits.requests_a_second),
        (limits.tokens_left, limits.tokens_a_second),
    ):
        assert left >= 0
        assert a_second == 0 or 1 / a_second <= 600
