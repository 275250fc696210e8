"""Time as a dependency, so that tests need no sleeping."""

import time
from typing import Protocol


class Clock(Protocol):
    """`monotonic` in seconds for intervals, `now` in seconds since the epoch for records."""

    def monotonic(self) -> float: ...

    def now(self) -> float: ...


class SystemClock:
    """The machine's clocks."""

    # Not methods of ours around them: on the request path each call of one counts.
    monotonic = staticmethod(time.monotonic)
    now = staticmethod(time.time)


class FakeClock:
    """A clock that moves only when told to. Shipped, because other rooms' tests and users' extensions need it."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._monotonic = 0.0
        self._start = start

    def monotonic(self) -> float:
        return self._monotonic

    def now(self) -> float:
        return self._start + self._monotonic

    def advance(self, seconds: float) -> None:
        self._monotonic += seconds
