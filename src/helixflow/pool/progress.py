"""How far a pull has come."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

_REPORT_INTERVAL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class PullProgress:
    """One report. Bytes count within the phase; `total_bytes` is None while unknown.

    `waiting`: another process or thread pulls the same model. A callback may raise to give up the pull.
    """

    phase: Literal["waiting", "downloading", "extracting", "converting", "verifying"]
    done_bytes: int
    total_bytes: int | None


Report = Callable[[PullProgress], None]


def ignore(progress: PullProgress) -> None:
    """The callback of those who do not look."""


class Throttle:
    """Passes at most about 20 reports a second on."""

    def __init__(self, progress: Report) -> None:
        self._progress = progress
        self._next = 0.0

    def send(self, report: PullProgress) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _REPORT_INTERVAL_S
            self._progress(report)
