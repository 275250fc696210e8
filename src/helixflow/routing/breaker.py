"""Whether a deployment deserves another try: a circuit breaker, decided without I/O."""

from helixflow.core.clock import Clock

FAILURES_TO_OPEN = 5
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Breaker:
    """Opens after `FAILURES_TO_OPEN` failures in a row; after a pause one trial call decides whether it closes."""

    __slots__ = ("_clock", "_failures", "_open_until", "_pause_s", "_trial")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until = 0.0
        self._trial = False

    @property
    def is_open(self) -> bool:
        """Whether calls should go elsewhere now."""
        if self._failures < FAILURES_TO_OPEN:
            return False
        return self._trial or self._clock.monotonic() < self._open_until

    @property
    def retry_after_s(self) -> float:
        return max(0.0, self._open_until - self._clock.monotonic())

    def begin(self) -> None:
        """A call is about to be tried."""
        if self._failures >= FAILURES_TO_OPEN:
            self._trial = True

    def succeed(self) -> None:
        if self._failures:
            self._failures = 0
            self._pause_s = FIRST_PAUSE_S
            self._trial = False

    def abandon(self) -> None:
        """The call ended without saying anything about the deployment (its client left, its request was bad)."""
        self._trial = False

    def fail(self) -> None:
        self._failures += 1
        self._trial = False
        if self._failures >= FAILURES_TO_OPEN:
            self._open_until = self._clock.monotonic() + self._pause_s
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
