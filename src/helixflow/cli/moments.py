"""Times and spans as people write them on a command line."""

import re
from datetime import UTC, datetime
from typing import Final

from helixflow.core.errors import ExitCode, UserError

_SPAN: Final = re.compile(r"([0-9]{1,6})([hdw])")
_SPAN_S: Final = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
_MAX_TIME: Final = 253_402_300_799  # the end of the year 9999


def parse_expiry(text: str, now: float, option: str = "--expires") -> int:
    """Epoch seconds of a moment to come: `30d`, `12h`, `2w`, a date or a time (UTC unless it says otherwise). Raises
    `UserError`.
    """
    if (span_s := _span_s(text)) is not None:
        at = int(now) + span_s
    else:
        try:
            at = int(_moment(text).timestamp())
        except (ValueError, OverflowError) as exc:
            raise UserError(
                f"{option} {text!r}: give a span (30d, 12h, 2w), a date (2027-01-31) or a time", ExitCode.USAGE
            ) from exc
    if at <= now:
        raise UserError(f"{option} {text!r}: lies in the past", ExitCode.USAGE)
    if at > _MAX_TIME:
        raise UserError(f"{option} {text!r}: lies after the year 9999; leave it out for never", ExitCode.USAGE)
    return at


def parse_past(text: str, now: float, option: str) -> str:
    """A time of RFC 3339 for `7d` (ago), `12h`, `2w`, a date or a time (UTC unless it says otherwise). Raises
    `UserError`.
    """
    try:
        if (span_s := _span_s(text)) is not None:
            return rfc3339(max(0, int(now) - span_s))
        return _shown(_moment(text).astimezone(UTC))
    except (ValueError, OverflowError) as exc:
        message = f"{option} {text!r}: give a span (7d, 12h, 2w), a date (2027-01-31) or a time"
        raise UserError(message, ExitCode.USAGE) from exc


def parse_moment(text: str, option: str) -> str:
    """A time of RFC 3339 for a date or a time (UTC unless it says otherwise), past or to come. Raises `UserError`."""
    try:
        return _shown(_moment(text).astimezone(UTC))
    except (ValueError, OverflowError) as exc:
        raise UserError(f"{option} {text!r}: give a date (2027-01-31) or a time", ExitCode.USAGE) from exc


def parse_span(text: str, option: str) -> int:
    """Seconds for `12h`, `7d` or `2w`. Raises `UserError`."""
    span_s = _span_s(text)
    if span_s is None:
        raise UserError(f"{option} {text!r}: give a span such as 12h, 7d or 2w", ExitCode.USAGE)
    return span_s


def rfc3339(epoch_s: int) -> str:
    """In UTC, to the second."""
    return _shown(datetime.fromtimestamp(epoch_s, UTC))


def _span_s(text: str) -> int | None:
    match = _SPAN.fullmatch(text.strip().lower())
    return int(match[1]) * _SPAN_S[match[2]] if match is not None else None


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text.strip())
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _shown(moment: datetime) -> str:
    return moment.replace(tzinfo=None).isoformat(timespec="seconds") + "Z"
