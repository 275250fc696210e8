"""How many retries and hedges a gateway makes: a part of its requests, so that a fault is not multiplied. No I/O."""

from typing import Final

from helixflow.core.clock import Clock
from helixflow.settings.serving import RoutingSettings

WINDOW_S: Final = 10


class RetryBudget:
    """At most `retry_percent` of the requests of the last `WINDOW_S` seconds, and `retry_reserve` beside them.

    Whoever asks first gets it: retries and hedges share it, over all models.
    """

    __slots__ = ("_clock", "_percent", "_requests", "_requests_sum", "_reserve", "_retries", "_retries_sum", "_second")

    def __init__(self, routing: RoutingSettings, clock: Clock) -> None:
        self._clock = clock
        self._percent = routing.retry_percent
        self._reserve = routing.retry_reserve
        # By whole seconds.
        self._requests = [0] * WINDOW_S
        self._retries = [0] * WINDOW_S
        self._requests_sum = 0
        self._retries_sum = 0
        self._second = 0

    def note_request(self) -> None:
        """A request has come in."""
        second = int(self._clock.monotonic())
        if second != self._second:
            self._turn_to(second)
        self._requests[second % WINDOW_S] += 1
        self._requests_sum += 1

    def try_retry(self) -> bool:
        """Whether one more attempt may be made; it counts then."""
        second = int(self._clock.monotonic())
        if second != self._second:
            self._turn_to(second)
        if 100 * (self._retries_sum + 1 - self._reserve) > self._percent * self._requests_sum:
            return False
        self._retries[second % WINDOW_S] += 1
        self._retries_sum += 1
        return True

    def _turn_to(self, second: int) -> None:
        """Forgets the seconds that have left the window."""
        for gone in range(self._second + 1, min(second, self._second + WINDOW_S) + 1):
            place = gone % WINDOW_S
            self._requests_sum -= self._requests[place]
            self._retries_sum -= self._retries[place]
            self._requests[place] = self._retries[place] = 0
        self._second = second
