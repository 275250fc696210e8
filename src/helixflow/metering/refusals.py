"""What clients are told of limits and budgets: errors that name what refused them, and `x-ratelimit-*` headers.

Messages name the kind of subject, never an id: whoever asks may not know what else is in the organisation.
"""

import math
from typing import Final

from helixflow.core.call import Meter
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Refusal
from helixflow.metering.policies import Budget, Limit, Metric, Period, Scope, Unit

_SUBJECTS: Final = {
    Scope.INSTALLATION: "this installation",
    Scope.ORGANISATION: "this organisation",
    Scope.PROJECT: "this project",
    Scope.USER: "this user",
    Scope.KEY: "this API key",
}
_METRICS: Final = {
    Metric.REQUESTS_PER_MINUTE: "requests per minute",
    Metric.TOKENS_PER_MINUTE: "tokens per minute",
    Metric.TOKENS_PER_DAY: "tokens per day",
    Metric.PARALLEL_REQUESTS: "parallel requests",
}
_PERIODS: Final = {Period.DAY: "daily ", Period.MONTH: "monthly ", Period.TOTAL: "total "}
_SOON_S: Final = 1.0
_UNITS: Final = {Unit.MONEY: "spending", Unit.TOKENS: "token"}


def refusal_error(refusal: Refusal) -> HelixError:
    """RATE_LIMITED for limits, INSUFFICIENT_QUOTA for budgets. `retry_after_s` is None where waiting does not help."""
    if refusal.limit is not None:
        message = _limit_message(refusal.limit, refusal)
        return HelixError(ErrorKind.RATE_LIMITED, message, retry_after_s=refusal.retry_after_s)
    if refusal.budget is None:
        raise ValueError("a refusal is by a limit or by a budget")
    message = _budget_message(refusal.budget, refusal)
    return HelixError(ErrorKind.INSUFFICIENT_QUOTA, message, retry_after_s=refusal.retry_after_s)


def render_headers(requests: Meter | None, tokens: Meter | None) -> list[tuple[bytes, bytes]]:
    """`x-ratelimit-limit-requests` and so on, for the meters that there are; none for none."""
    lines = render_header_lines(requests, tokens).split(b"\r\n")[:-1]
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


def render_header_lines(requests: Meter | None, tokens: Meter | None) -> bytes:
    """The same as they are on the wire, each line with its end."""
    if requests is None:
        return b"" if tokens is None else _TOKENS % (tokens.limit, tokens.remaining, format_duration(tokens.reset_s))
    if tokens is None:
        return _REQUESTS % (requests.limit, requests.remaining, format_duration(requests.reset_s))
    return _BOTH % (
        requests.limit,
        requests.remaining,
        format_duration(requests.reset_s),
        tokens.limit,
        tokens.remaining,
        format_duration(tokens.reset_s),
    )


def format_duration(seconds: float) -> bytes:
    """As OpenAI writes them: `20ms`, `1.2s`, `6m0s`, `23h59m1s`; rounded up, to milliseconds and from a minute on to
    seconds."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds <= 0:
        return b"0s"
    if milliseconds < 1000:
        return b"%dms" % milliseconds
    if milliseconds < 60_000:
        return (b"%d.%03d" % divmod(milliseconds, 1000)).rstrip(b"0").rstrip(b".") + b"s"
    whole = -(-milliseconds // 1000)
    if whole < 3600:
        return b"%dm%ds" % divmod(whole, 60)
    return b"%dh%dm%ds" % (whole // 3600, whole // 60 % 60, whole % 60)


def _header_lines(kind: bytes) -> bytes:
    return b"".join(
        b"x-ratelimit-%s-%s: %s\r\n" % (what, kind, value)
        for what, value in ((b"limit", b"%d"), (b"remaining", b"%d"), (b"reset", b"%b"))
    )


_REQUESTS: Final = _header_lines(b"requests")
_TOKENS: Final = _header_lines(b"tokens")
_BOTH: Final = _REQUESTS + _TOKENS


def _limit_message(limit: Limit, refusal: Refusal) -> str:
    what = f"{_METRICS[limit.metric]} of {_SUBJECTS[limit.scope]}"
    if limit.model:
        what += f" with the model {limit.model}"
    if refusal.too_large:
        return (
            f"Request too large for {what}: limit {limit.burst} at once, requested {refusal.requested}. "
            "Shorten the prompt or lower max_tokens."
        )
    text = f"Rate limit reached for {what}: limit {limit.value}."
    return text if refusal.retry_after_s is None else f"{text} Try again in {_spell(refusal.retry_after_s)}."


def _budget_message(budget: Budget, refusal: Refusal) -> str:
    name = f"{_PERIODS[budget.period]}{_UNITS[budget.unit]} budget of {_SUBJECTS[budget.scope]}"
    if refusal.too_large:
        return (
            f"Request too large: it could use more than the whole {name}. Shorten the prompt or lower max_tokens, "
            "or have the budget raised."
        )
    if refusal.retry_after_s is not None and refusal.retry_after_s <= _SOON_S:
        # Not spent: requests under way have reserved it, or the server that counts is away.
        return f"The {name} has no room for this request at the moment. Try again in {_spell(refusal.retry_after_s)}."
    message = f"The {name} has no room left for this request."
    if refusal.retry_after_s is None:
        return f"{message} Have it raised."
    return f"{message} Try again in {_spell(refusal.retry_after_s)}, or have it raised."


def _spell(seconds: float) -> str:
    """Rounded up, in the one or two units that matter."""
    tenths = math.ceil(seconds * 10)
    if tenths < 1200:
        return f"{tenths // 10} s" if tenths % 10 == 0 else f"{tenths / 10} s"
    minutes = -(-tenths // 600)
    if minutes < 120:
        return f"{minutes} min"
    hours = -(-minutes // 60)
    return f"{hours} h" if hours < 48 else f"{-(-hours // 24)} days"
