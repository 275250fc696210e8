"""Rates that hold exactly: the generic cell rate algorithm in whole numbers.

A bucket of `burst` units refills at `value` units a window. Its state is one number, the moment at which it will be
full (the theoretical arrival time), times `value`: on that scale a unit takes exactly `window_us`, so no division, and
no rounding, ever enters the state. Over any time what is taken, less what is given back, is at most
burst + ⌊rate × elapsed⌋, and a caller who never stops asking gets just that.
"""

from typing import Final

from helixflow.core.call import Meter

# In place of a wait.
NEVER: Final = -1


class Bucket:
    """`value` units (at least 1) a window of `window_us` microseconds, of which `burst` at once; full at first.

    Moments (`now_us`) are microseconds on a clock that never goes back. `tat` is the state; one that is past means
    full, so that what is given back beyond that is lost.
    """

    __slots__ = ("_a_second", "_depth", "burst", "tat", "value", "window_us")

    def __init__(self, value: int, window_us: int, burst: int) -> None:
        self.value = value
        self.window_us = window_us
        self.burst = burst
        self.tat = 0
        self._depth = burst * window_us
        self._a_second = value * 1_000_000

    def take(self, now_us: int, cost: int) -> bool:
        """Takes so many units, if they are there."""
        now = now_us * self.value
        tat = self.tat
        if tat < now:
            tat = now
        tat += cost * self.window_us
        if tat - now > self._depth:
            return False
        self.tat = tat
        return True

    def wait_us(self, now_us: int, cost: int) -> int:
        """Microseconds until so many units are there: 0 for now, NEVER for more than the bucket holds."""
        if cost > self.burst:
            return NEVER
        now = now_us * self.value
        excess = max(self.tat, now) + cost * self.window_us - now - self._depth
        return -(-excess // self.value) if excess > 0 else 0

    def owe(self, now_us: int, cost: int) -> None:
        """Takes units that have been used already: what is not there must be refilled before there is any."""
        self.tat = max(self.tat, now_us * self.value) + cost * self.window_us

    def give_back(self, cost: int) -> None:
        """Right after `take` this undoes it."""
        self.tat -= cost * self.window_us

    def meter(self, now_us: int) -> Meter:
        """Whole units that are there, and how long until the bucket is full: to be shown, not to decide by."""
        missing = self.tat - now_us * self.value
        if missing <= 0:
            return Meter(self.value, self.burst, 0.0)
        there = self._depth - missing
        return Meter(self.value, there // self.window_us if there > 0 else 0, missing / self._a_second)

    def change(self, now_us: int, value: int, burst: int) -> None:
        """Another rate for the same window: what is missing stays missing."""
        self.tat = now_us * value + max(self.tat - now_us * self.value, 0)
        self.value = value
        self.burst = burst
        self._depth = burst * self.window_us
        self._a_second = value * 1_000_000
