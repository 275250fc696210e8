"""Whether a target deserves another call: ejection after failures in a row, then one trial that decides. No I/O."""

import random
from collections.abc import Callable
from typing import Final

from helixflow.core.clock import Clock
from helixflow.settings.serving import RoutingSettings

# Part of an ejection that is added at random: gateways that ejected together do not all come back at once.
_JITTER: Final = 0.1
_NEVER: Final = -1e18


class Health:
    """The health of one target, in the eyes of this gateway.

    Every call takes a turn with `begin` and ends it once: `succeed` when its first content is at hand, `fail` when the
    target is at fault, `abandon` for all else. A stream that had begun ends with `finish` or `break_off` as well.

    `ejection_failures` failures in a row, of openings or of streams, eject the target: `is_open` until a pause is over
    that doubles with each ejection. Then a single call at a time is let through; its success puts the target back into
    service, its failure ejects it again. Ends of calls that began before the last ejection, or before the target came
    back, change nothing: a hundred calls that fail together are one ejection, not a hundred.
    """

    __slots__ = (
        "_broken",
        "_clock",
        "_ejection_failures",
        "_ejection_max_s",
        "_ejection_s",
        "_era",
        "_failures",
        "_healed_at",
        "_open_until",
        "_random_unit",
        "_rest_until",
        "_rounds",
        "_trial",
        "begun",
        "failed",
        "is_untroubled",
        "latency_sum_s",
        "succeeded",
    )

    def __init__(
        self, routing: RoutingSettings, clock: Clock, *, random_unit: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._random_unit = random_unit
        self._ejection_failures = routing.ejection_failures
        self._ejection_s = routing.ejection_s
        self._ejection_max_s = routing.ejection_max_s
        # Even while in service, odd while ejected; grows with each change.
        self._era = 0
        self._failures = 0
        self._broken = 0
        self._rounds = 0
        # Until when it is left alone, and until when it asked for that itself.
        self._open_until = self._rest_until = _NEVER
        self._healed_at = _NEVER
        self._trial = False
        # False while it is ejected or was asked to be left alone: then `is_open` has to be asked.
        self.is_untroubled = True
        # What `outliers` and `probes` look at. `begun` only grows; the others fade, see `age`.
        self.begun = 0
        self.succeeded = 0.0
        self.failed = 0.0
        self.latency_sum_s = 0.0

    @property
    def is_ejected(self) -> bool:
        """Whether it is out of service, on trial included."""
        return self._era & 1 == 1

    @property
    def is_open(self) -> bool:
        """Whether calls should go elsewhere now."""
        if self._era & 1:
            return self._trial or self._clock.monotonic() < self._open_until
        # Not ejected, but it may have asked for a rest.
        return not self.is_untroubled and self._clock.monotonic() < self._open_until

    @property
    def retry_after_s(self) -> float:
        """Seconds until it may be tried again; 0 when it may be now, or as soon as the trial under way has ended."""
        return max(0.0, self._open_until - self._clock.monotonic())

    def begin(self) -> int:
        """A call is about to be tried, also while `is_open` (where nothing better is left). Its turn, for its end."""
        self.begun += 1
        era = self._era
        if era & 1 and not self._trial and self._clock.monotonic() >= self._open_until:
            self._trial = True
            return -era
        return era

    def is_trial(self, turn: int) -> bool:
        """Whether this call, which has not ended, decides on the target's return."""
        return self._trial and turn == -self._era

    def succeed(self, turn: int, latency_s: float, *, whole: bool = False) -> None:
        """The call's first content is at hand, after `latency_s`; or the `whole` answer: no `finish` comes then."""
        era = self._era
        if whole:
            self._broken = 0
        if turn == era and not era & 1:
            self._failures = 0
            self.succeeded += 1
            self.latency_sum_s += latency_s
            if not self.is_untroubled and self._clock.monotonic() >= self._open_until:
                # It has had its rest.
                self._open_until = self._rest_until = _NEVER
                self.is_untroubled = True
        elif turn in (era, -era):
            # The trial, or a call for which nothing better was left: it serves again.
            self._heal()

    def fail(self, turn: int, *, retry_after_s: float | None = None) -> None:
        """The target failed before the first content. It is left alone for `retry_after_s` if it says so."""
        era = self._era
        if turn == era and not era & 1:
            self._failures += 1
            self.failed += 1
            if self._failures >= self._ejection_failures:
                self.eject()
        elif turn == -era:
            self.eject()
        if retry_after_s is not None:
            self._rest(retry_after_s)

    def abandon(self, turn: int, *, retry_after_s: float | None = None) -> None:
        """The call ended without saying anything about the target (its client left, its request was bad, it lost
        against a hedge), except perhaps that it wants to be left alone for `retry_after_s` (503, overloaded).
        """
        if self.is_trial(turn):
            self._trial = False
        if retry_after_s is not None:
            self._rest(retry_after_s)

    def break_off(self, turn: int) -> None:
        """The stream of a call that had succeeded was broken off by the target."""
        # What took its turn while the target was ejected brought it back into service: the era after.
        if (1 - turn if turn < 0 else turn + (turn & 1)) != self._era:
            return
        self.failed += 1
        self._broken += 1
        if self._broken >= self._ejection_failures:
            self.eject()

    def finish(self) -> None:
        """The stream of a call that had succeeded came to its end."""
        self._broken = 0

    def probed(self, *, well: bool) -> None:
        """A probe answered, or did not. It brings forward the trial of a target that is ejected and never replaces it:
        who lists models may still fail to generate.
        """
        if not self._era & 1:
            if well:
                self._failures = 0
            else:
                self._failures += 1
                if self._failures >= self._ejection_failures:
                    self.eject()
        elif not self._trial:
            if well:
                self._open_until = self._rest_until
            elif self._clock.monotonic() >= self._open_until:
                self.eject()

    def age(self, kept: float) -> None:
        """Lets what was measured count for `kept` (0 to 1) of what it did."""
        self.succeeded *= kept
        self.failed *= kept
        self.latency_sum_s *= kept

    def eject(self) -> None:
        """Takes it out of service (again)."""
        now = self._clock.monotonic()
        era = self._era
        if not era & 1 and now - self._healed_at >= self._ejection_max_s:
            self._rounds = 0
        pause_s = min(self._ejection_s * 2.0 ** min(self._rounds, 30), self._ejection_max_s)
        self._open_until = max(now + pause_s * (1 + _JITTER * self._random_unit()), self._rest_until)
        self._rounds += 1
        self._era = era + 2 if era & 1 else era + 1
        self._trial = self.is_untroubled = False
        self._failures = 0
        self.succeeded = self.failed = self.latency_sum_s = 0.0

    def _heal(self) -> None:
        self._era += 1
        self._trial = False
        self._failures = 0
        self._open_until = self._rest_until = _NEVER
        self.is_untroubled = True
        self._healed_at = self._clock.monotonic()

    def _rest(self, seconds: float) -> None:
        self.is_untroubled = False
        self._rest_until = max(self._rest_until, self._clock.monotonic() + seconds)
        self._open_until = max(self._open_until, self._rest_until)
