"""`x-ratelimit-*`: the states of the tightest limits, on every answer of a caller that has some."""

from helixflow.core.call import Meter


def limit_headers(requests: Meter | None, tokens: Meter | None) -> list[tuple[bytes, bytes]]:
    """The header fields; none without limits."""
    fields: list[tuple[bytes, bytes]] = []
    for kind, meter in ((b"requests", requests), (b"tokens", tokens)):
        if meter is not None:
            fields += (
                (b"x-ratelimit-limit-" + kind, b"%d" % meter.limit),
                (b"x-ratelimit-remaining-" + kind, b"%d" % meter.remaining),
                (b"x-ratelimit-reset-" + kind, render_duration(meter.reset_s)),
            )
    return fields


def limit_lines(requests: Meter | None, tokens: Meter | None) -> bytes:
    """The same as lines of a head."""
    lines = b""
    if requests is not None:
        lines = (
            b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\n"
            b"x-ratelimit-reset-requests: %b\r\n"
            % (requests.limit, requests.remaining, render_duration(requests.reset_s))
        )
    if tokens is not None:
        lines += (
            b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %d\r\nx-ratelimit-reset-tokens: %b\r\n"
            % (tokens.limit, tokens.remaining, render_duration(tokens.reset_s))
        )
    return lines


def render_duration(seconds: float) -> bytes:
    """As OpenAI writes durations: `20ms`, `1.5s`, `6m0s`, `1h2m3s`; rounded up to the millisecond."""
    milliseconds = -int(-seconds * 1000 // 1)
    if milliseconds < 1000:
        return b"%dms" % max(milliseconds, 0)
    minutes, rest = divmod(milliseconds, 60_000)
    whole, thousandths = divmod(rest, 1000)
    text = (b"%d.%03d" % (whole, thousandths)).rstrip(b"0") if thousandths else b"%d" % whole
    if not minutes:
        return text + b"s"
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%bs" % (hours, minutes, text) if hours else b"%dm%bs" % (minutes, text)
