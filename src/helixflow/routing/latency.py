"""How long something takes lately: one figure that follows what is measured and forgets what is old."""

from math import exp, log
from typing import Final

# Whatever their rate: so many measurements in a row outweigh what was before, and one alone does not.
_KEPT_AT_MOST: Final = 0.9


class Latency:
    """An average of seconds. What was measured counts half after `half_life_s`, and so does the whole figure while
    nothing is measured: who was slow once is tried again.
    """

    __slots__ = ("_measured_at", "_rate", "_value")

    def __init__(self, half_life_s: float) -> None:
        self._rate = log(2) / half_life_s
        self._value = 0.0
        self._measured_at = 0.0

    def measure(self, seconds: float, now: float) -> None:
        """`now` is on the clock that `estimate` is asked with, in seconds."""
        if self._value:
            kept = min(exp(self._rate * (self._measured_at - now)), _KEPT_AT_MOST)
            self._value = kept * self._value + (1 - kept) * seconds
        else:
            self._value = seconds
        self._measured_at = now

    def estimate(self, now: float) -> float:
        """Seconds; 0.0 while nothing is known."""
        value = self._value  # written out: this is asked twice for each call
        return value * exp(self._rate * (self._measured_at - now)) if value else 0.0
