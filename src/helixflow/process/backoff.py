"""When to start a crashed process again, and when to stop trying. Decisions only: no clock is read, nothing waits."""

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Final

# How long somebody is left out, of the time that it served before.
_SERVICE_SHARE: Final = 0.1


class Backoff:
    """Delays between restarts: `initial_s`, doubled with every failure in a row up to `maximum_s`, then jittered.

    The jitter takes up to `jitter` of the delay away, so that processes that fell together do not rise together. A run
    of at least `reset_after_s` counts as healthy and starts the row anew. After a shorter one the delay is a tenth of
    it at most, and the row goes on from there: who served for 20 s and was killed is not left out for 30.
    """

    def __init__(
        self,
        *,
        initial_s: float = 0.5,
        maximum_s: float = 30.0,
        reset_after_s: float = 60.0,
        jitter: float = 0.25,
        random_unit: Callable[[], float] = random.random,
    ) -> None:
        self._initial_s = initial_s
        self._maximum_s = maximum_s
        self._reset_after_s = reset_after_s
        self._jitter = jitter
        self._random_unit = random_unit
        self.failures = 0

    def next_delay_s(self, healthy_s: float) -> float:
        """Counts one failure after `healthy_s` seconds of service (0 for none) and says how long to wait."""
        if healthy_s >= self._reset_after_s:
            self.failures = 0
        delay_s: float = min(self._maximum_s, self._initial_s * 2.0 ** min(self.failures, 30))
        if self._initial_s < (most_s := healthy_s * _SERVICE_SHARE) < delay_s:
            delay_s = most_s
            self.failures = int(math.log2(delay_s / self._initial_s))
        self.failures += 1
        return delay_s * (1 - self._jitter * self._random_unit())

    def reset(self) -> None:
        """Forgets the row of failures."""
        self.failures = 0


class CrashLoop:
    """Notices `limit` exits within `window_s` seconds."""

    def __init__(self, *, limit: int = 5, window_s: float = 60.0) -> None:
        self._exits: deque[float] = deque(maxlen=limit)
        self._window_s = window_s

    def record_exit(self, now: float) -> bool:
        """Counts an exit at `now` (monotonic seconds); true when the limit is reached."""
        self._exits.append(now)
        return len(self._exits) == self._exits.maxlen and now - self._exits[0] <= self._window_s
