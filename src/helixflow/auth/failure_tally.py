"""How many failed sign-ins one e-mail or one address has, and what follows from it: arithmetic only."""

from dataclasses import dataclass, replace
from typing import Final

LONGEST_LOCK_S: Final = 15 * 60
FORGOTTEN_AFTER_S: Final = 24 * 3600
HALVING_S: Final = 3600


@dataclass(frozen=True, slots=True)
class Limit:
    """From `failures` on there are locks. With `halving` half of the failures are forgotten at each full hour."""

    failures: int
    halving: bool


BY_EMAIL: Final = Limit(5, halving=False)
# Many people may share an address, and somebody's forgotten program, which fails every few minutes for months.
BY_ADDRESS: Final = Limit(20, halving=True)


@dataclass(frozen=True, slots=True)
class Tally:
    """Failures as of `counted_at`, and the end of the lock that the latest of them set. Seconds since the epoch."""

    limit: Limit
    failures: int = 0
    counted_at: int = 0
    locked_until: int = 0

    def at(self, now: int) -> "Tally":
        """What is left of it by `now`."""
        failures = self.failures
        if self.limit.halving:
            # By the hours of the clock, not since the latest failure: who fails once in a while would else never be
            # forgiven anything.
            failures >>= max(0, now // HALVING_S - self.counted_at // HALVING_S)
        elif now - self.counted_at >= FORGOTTEN_AFTER_S:
            failures = 0
        return replace(self, failures=failures, counted_at=now)

    def admits(self, under_way: int, abandoned: int = 0) -> bool:
        """Whether one more may be tried beside so many that are being tried: if all fail, the limit is not exceeded.

        Beyond the limit it is one at a time. Attempts that were `abandoned` are as good as failures.
        """
        return under_way < max(1, self.limit.failures - self.failures - abandoned)

    def after_failure(self, now: int) -> "Tally":
        failures = self.at(now).failures + 1
        locked_until = max(self.locked_until, now + lock_s(failures, self.limit.failures))
        return replace(self, failures=failures, counted_at=now, locked_until=locked_until)

    def after_success(self, now: int) -> "Tally":
        """One failure less."""
        left = self.at(now)
        return replace(left, failures=max(0, left.failures - 1))


def lock_s(failures: int, threshold: int) -> int:
    """For how many seconds no further attempt is taken after that many: 1, 2, 4 … from the threshold on."""
    if failures < threshold:
        return 0
    return min(LONGEST_LOCK_S, 1 << min(failures - threshold, 10))
