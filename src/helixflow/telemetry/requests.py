"""One structured line per request. On the hot path, so it does without a logging library: measured 3 µs a line, where
structlog takes 25.
"""

import asyncio
import os
import time
from typing import Literal, TextIO

import msgspec
from msgspec import Struct

from helixflow.telemetry.logs import is_text

_FLUSH_AFTER_S = 0.1
_FLUSH_AT_LINES = 512


class RequestRecord(Struct):
    """What is known of a request once it is over; never prompts, answers or keys. Times in seconds."""

    timestamp: str
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
    event: str = "request"
    level: str = "info"
    service: str = "gateway"


class RequestLog:
    """Collects lines and writes them a moment later in one go; `flush` before the process ends."""

    def __init__(self, stream: TextIO, format: Literal["auto", "text", "json"], *, enabled: bool = True) -> None:
        self._fd = stream.fileno()
        self._text = is_text(format, stream)
        self._enabled = enabled
        self._lines: list[RequestRecord] = []
        self._timer: asyncio.TimerHandle | None = None
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

    def write(self, record: RequestRecord) -> None:
        if not self._enabled:
            return
        self._lines.append(record)
        if len(self._lines) >= _FLUSH_AT_LINES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_AFTER_S, self.flush)

    def flush(self) -> None:
        """Writes what is waiting. A reader that went away (a closed pipe) costs the lines, not the service."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        if not lines:
            return
        render = self._for_people if self._text else self._encoder.encode
        data = b"\n".join([render(line) for line in lines]) + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except BrokenPipeError:
            self._enabled = False

    @staticmethod
    def _for_people(record: RequestRecord) -> bytes:
        first = f" first {record.first_token_s * 1000:.0f} ms" if record.first_token_s is not None else ""
        tokens = (
            f" {record.prompt_tokens}+{record.completion_tokens} tokens" if record.prompt_tokens is not None else ""
        )
        error = f" {record.error}" if record.error else ""
        return (
            f"{record.timestamp[11:19]} {record.status} {record.operation} {record.model or '-'}"
            f" {record.duration_s * 1000:.0f} ms{first}{tokens}{error} {record.request_id}"
        ).encode()
