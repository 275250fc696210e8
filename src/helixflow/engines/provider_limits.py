"""What providers say of their rate limits in the heads of their answers.

Sources: OpenAI, "Rate limits: headers" (`x-ratelimit-*`; many others do the same), and Anthropic, "Rate limits:
response headers" (`anthropic-ratelimit-*`).
"""

import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from helixflow.core.capacity import ProviderLimits

# Whatever a server says: it is asked again after so long, and then says anew.
_LONGEST_RESET_S: Final = 600.0
_MAX_DIGITS: Final = 12
# Go's notation of durations: `6m0s`, `1.5s`, `20ms`.
_DURATION: Final = re.compile(rb"(?:(\d{1,6})h)?(?:(\d{1,6})m(?!s))?(?:(\d{1,6}(?:\.\d{1,9})?)s)?(?:(\d{1,9})ms)?")

_USUAL_WINDOW_S: Final = 60.0
# Of requests and of tokens: the names for the limit, what is left of it, and when all of it will be there again.
_OPENAI: Final = tuple(
    (b"x-ratelimit-limit-" + unit, b"x-ratelimit-remaining-" + unit, b"x-ratelimit-reset-" + unit)
    for unit in (b"requests", b"tokens")
)
_ANTHROPIC: Final = tuple(
    (prefix + b"-limit", prefix + b"-remaining", prefix + b"-reset")
    for prefix in (b"anthropic-ratelimit-requests", b"anthropic-ratelimit-tokens")
)

Headers = Mapping[bytes, bytes]


def read_limits(headers: Headers, limits: ProviderLimits) -> None:
    """Takes over what the head says; what it does not say, or not understandably, stays as it was."""
    if b"x-ratelimit-remaining-requests" in headers or b"x-ratelimit-remaining-tokens" in headers:
        of_requests, of_tokens = (_refill(headers, names, _duration_s) for names in _OPENAI)
    elif b"anthropic-ratelimit-requests-remaining" in headers:
        of_requests, of_tokens = (_refill(headers, names, _until_s) for names in _ANTHROPIC)
    else:
        return
    limits.are_known = True
    now = time.monotonic()
    if of_requests is not None:
        limits.requests_left, limits.requests_a_second = of_requests
        limits.requests_at = now
    if of_tokens is not None:
        limits.tokens_left, limits.tokens_a_second = of_tokens
        limits.tokens_at = now


def _refill(
    headers: Headers, names: tuple[bytes, bytes, bytes], seconds_of: Callable[[bytes], float]
) -> tuple[int, float] | None:
    """What is left, and how much comes back in a second: all that is missing in the time until none is."""
    limit, remaining, reset = names
    left = _count(headers.get(remaining))
    if left is None:
        return None
    whole = _count(headers.get(limit))
    if whole is None:
        return left, 0.0
    if left * 4 > whole:
        # It says that with every answer: nothing is read closely while there is enough.
        return left, whole / _USUAL_WINDOW_S
    reset_s = seconds_of(headers.get(reset, b""))
    return left, max(whole - left, 1) / min(reset_s, _LONGEST_RESET_S) if reset_s > 0 else 0.0


def _count(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() and len(value) <= _MAX_DIGITS else None


def _duration_s(value: bytes) -> float:
    """0 for what is none."""
    found = _DURATION.fullmatch(value)
    if found is None:
        return 0.0
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def _until_s(value: bytes) -> float:
    """Seconds until a moment (RFC 3339) by this machine's clock; 0 for what is none, or has passed."""
    try:
        moment = datetime.fromisoformat(value.decode("ascii"))
    except ValueError:
        return 0.0
    return max(0.0, moment.timestamp() - time.time()) if moment.tzinfo is not None else 0.0
