"""Rates that hold exactly: the generic cell rate algorithm in whole numbers.

A bucket of `burst` units refills at `value` units a window. Its state is one number, the moment at which it will be full
(the theoretical arrival time), times `value`: on that scale a unit takes exactly `window_us`, so that no division, and
no rounding, ever enters the state. Over any time what is taken, less what is given back, is at most
burst + ⌊rate × elapsed⌋, and a caller who never stops asking gets just that. A state of 0 is a full bucket.
"""

from typing import Final

from msgspec import Struct

NEVER: Final = -1


class Rate(Struct, frozen=True, gc=False):
    """`value` units (at least 1) a window of `window_us` microseconds, of which `burst` at once.

    `tat` is the state, `now_us` a moment in microseconds on a clock that never goes back. Nothing here keeps anything:
    what changes a state returns the new one.
    """

    value: int
    window_us: int
    burst: int

    def check(self, tat: int, now_us: int, cost: int) -> int:
        """Microseconds until so many units may be taken: 0 for now, NEVER for more than the bucket holds."""
        if cost > self.burst:
            return NEVER
        now = now_us * self.value
        excess = (tat if tat > now else now) + (cost - self.burst) * self.window_us - now
        return -(-excess // self.value) if excess > 0 else 0

    def charge(self, tat: int, now_us: int, cost: int) -> int:
        """Takes so many units, whether they are there or not: what is missing must be refilled first."""
        now = now_us * self.value
        return (tat if tat > now else now) + cost * self.window_us

    def refund(self, tat: int, cost: int) -> int:
        """Gives so many units back. What the bucket cannot hold is lost: a moment that is past means full."""
        return tat - cost * self.window_us

    def remaining(self, tat: int, now_us: int) -> int:
        """Whole units that may be taken now."""
        owed = tat - now_us * self.value
        left = self.burst if owed <= 0 else (self.burst * self.window_us - owed) // self.window_us
        return left if left > 0 else 0

    def reset_us(self, tat: int, now_us: int) -> int:
        """Microseconds until the bucket is full."""
        owed = tat - now_us * self.value
        return -(-owed // self.value) if owed > 0 else 0

    def adopted(self, tat: int, now_us: int, before: "Rate") -> int:
        """The state under this rate of a bucket kept by another one of the same window: what is missing stays missing."""
        return now_us * self.value + max(tat - now_us * before.value, 0)
