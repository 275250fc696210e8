import pytest

from helixflow.core.call import Meter
from helixflow.core.errors import ErrorKind
from helixflow.metering.admission import Refusal
from helixflow.metering.policies import Budget, Limit, Metric, Period, Scope, Unit
from helixflow.metering.refusals import format_duration, refusal_error, render_header_lines, render_headers


def _limit(metric: Metric, value: int, scope: Scope, model: str = "") -> Limit:
    return Limit("lim_secret", "org_secret", scope, "subject_secret", model, metric, value, value)


def _budget(unit: Unit, period: Period, scope: Scope) -> Budget:
    return Budget("bud_secret", "org_secret", scope, "subject_secret", unit, period, 987654321)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            Refusal(limit=_limit(Metric.REQUESTS_PER_MINUTE, 60, Scope.KEY), retry_after_s=1.2),
            "Rate limit reached for requests per minute of this API key: limit 60. Try again in 1.2 s.",
        ),
        (
            Refusal(limit=_limit(Metric.TOKENS_PER_DAY, 5000, Scope.ORGANISATION, "tiny"), retry_after_s=40_000.3),
            "Rate limit reached for tokens per day of this organisation with the model tiny: limit 5000. "
            "Try again in 12 h.",
        ),
        (
            Refusal(limit=_limit(Metric.PARALLEL_REQUESTS, 2, Scope.USER), retry_after_s=1.0),
            "Rate limit reached for parallel requests of this user: limit 2. Try again in 1 s.",
        ),
        (
            Refusal(
                limit=_limit(Metric.TOKENS_PER_MINUTE, 1000, Scope.PROJECT),
                retry_after_s=None,
                too_large=True,
                requested=2000,
            ),
            "Request too large for tokens per minute of this project: limit 1000 at once, requested 2000. "
            "Shorten the prompt or lower max_tokens.",
        ),
    ],
)
def test_a_limit_is_named(refusal: Refusal, message: str) -> None:
    error = refusal_error(refusal)
    assert error.message == message
    assert (error.kind, error.code, error.traits.http) == (ErrorKind.RATE_LIMITED, "rate_limit_exceeded", 429)
    assert error.retry_after_s == refusal.retry_after_s


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            Refusal(budget=_budget(Unit.MONEY, Period.MONTH, Scope.PROJECT), retry_after_s=864_000.0),
            "The monthly spending budget of this project has no room left for this request. "
            "Try again in 10 days, or have it raised.",
        ),
        (
            Refusal(budget=_budget(Unit.TOKENS, Period.TOTAL, Scope.KEY), retry_after_s=None),
            "The total token budget of this API key has no room left for this request. Have it raised.",
        ),
        (
            Refusal(
                budget=_budget(Unit.TOKENS, Period.DAY, Scope.ORGANISATION),
                retry_after_s=None,
                too_large=True,
                requested=10**12,
            ),
            "Request too large: it could use more than the whole daily token budget of this organisation. "
            "Shorten the prompt or lower max_tokens, or have the budget raised.",
        ),
    ],
)
def test_a_budget_is_named_and_no_amount_of_it(refusal: Refusal, message: str) -> None:
    error = refusal_error(refusal)
    assert error.message == message
    assert (error.kind, error.code, error.traits.http) == (ErrorKind.INSUFFICIENT_QUOTA, "insufficient_quota", 429)
    assert error.retry_after_s == refusal.retry_after_s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, b"0s"),
        (-1, b"0s"),
        (0.0001, b"1ms"),
        (0.02, b"20ms"),
        (0.9995, b"1s"),
        (1, b"1s"),
        (1.2, b"1.2s"),
        (8.64, b"8.64s"),
        (10, b"10s"),
        (59.9991, b"1m0s"),
        (360, b"6m0s"),
        (372.5, b"6m13s"),
        (3599.1, b"1h0m0s"),
        (86_399.0, b"23h59m59s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: bytes) -> None:
    assert format_duration(seconds) == text


def test_headers_are_of_the_limits_that_there_are() -> None:
    requests, tokens = Meter(60, 59, 1.0), Meter(100_000, 98_900, 360.0)
    both = [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"59"),
        (b"x-ratelimit-reset-requests", b"1s"),
        (b"x-ratelimit-limit-tokens", b"100000"),
        (b"x-ratelimit-remaining-tokens", b"98900"),
        (b"x-ratelimit-reset-tokens", b"6m0s"),
    ]
    assert render_headers(requests, tokens) == both
    assert render_headers(requests, None) == both[:3]
    assert render_headers(None, tokens) == both[3:]
    assert render_headers(None, None) == []
    assert render_header_lines(None, None) == b""
    lines = b"".join(b"%b: %b\r\n" % header for header in both)
    assert render_header_lines(requests, tokens) == lines
