"""Log lines of the launcher, in the shape of `telemetry.logs`. structlog loads asyncio, which the launcher must not."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Literal, TextIO

_LEVELS: Final = {"debug": 0, "info": 1, "warning": 2, "error": 3}
Clock = Callable[[], float]


class RecordLog:
    """Writes one event a line to `stream`: text on a terminal, JSON otherwise (`format` as in `settings.log`)."""

    def __init__(
        self,
        stream: TextIO,
        *,
        level: str,
        format: Literal["auto", "text", "json"],
        service: str,
        now: Clock = time.time,
    ) -> None:
        self._stream = stream
        self._least = _LEVELS[level]
        self._text = format == "text" or (format == "auto" and stream.isatty())
        self._service = service
        self._now = now

    def debug(self, event: str, **fields: object) -> None:
        self.write("debug", event, **fields)

    def info(self, event: str, **fields: object) -> None:
        self.write("info", event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        self.write("warning", event, **fields)

    def error(self, event: str, **fields: object) -> None:
        self.write("error", event, **fields)

    def write(self, level: str, event: str, **fields: object) -> None:
        """One line. A stream that takes nothing any more (closed terminal, full disk) loses it: nothing else stops."""
        if _LEVELS[level] < self._least:
            return
        line = self._as_text(level, event, fields) if self._text else self._as_json(level, event, fields)
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError:
            return

    def _as_text(self, level: str, event: str, fields: dict[str, object]) -> str:
        at = datetime.fromtimestamp(self._now()).strftime("%H:%M:%S")
        pairs = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        return " ".join(part for part in (f"{at} [{level:<9}] {event:<24}", pairs, f"service={self._service}") if part)

    def _as_json(self, level: str, event: str, fields: dict[str, object]) -> str:
        at = datetime.fromtimestamp(self._now(), UTC).isoformat().replace("+00:00", "Z")
        record = {**fields, "event": event, "level": level, "timestamp": at, "service": self._service}
        return json.dumps(record, default=str)


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if isinstance(value, str) and (" " in text or not text.isprintable() or not text) else text
