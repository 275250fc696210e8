"""The same one of several for the same key, without remembering anything: weighted rendezvous hashing.

All gateways choose alike, and when one of several goes, comes or changes its weight, only the keys move that must.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from math import log
from typing import Final, Protocol, TypeVar

_MASK: Final = 2**64 - 1
# An odd constant without structure (the golden ratio's fraction), as in Fibonacci hashing.
_FACTOR: Final = 0x9E3779B97F4A7C15


class Named(Protocol):
    @property
    def seat_id(self) -> str: ...


AnyNamed = TypeVar("AnyNamed", bound=Named)


def pick_sticky(key: str, seats: Sequence[AnyNamed], shares: Sequence[float] | None = None) -> AnyNamed:
    """The seat of `key`. `shares` are the running sums of the seats' weights; None when all weigh the same."""
    drawn = _digest(key)
    if shares is None:
        numbers = [((drawn ^ _digest_of_seat(seat.seat_id)) * _FACTOR & _MASK) for seat in seats]
        return seats[numbers.index(max(numbers))]
    best, best_score, before = seats[0], 0.0, 0.0
    for seat, running in zip(seats, shares, strict=True):
        number = (drawn ^ _digest_of_seat(seat.seat_id)) * _FACTOR & _MASK
        # The logarithm of a number between 0 and 1, over the weight: the largest is nearest to 0.
        score = (running - before) / -log((number + 0.5) / 2**64)
        if score > best_score:
            best, best_score = seat, score
        before = running
    return best


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


@lru_cache(maxsize=4096)
def _digest_of_seat(seat_id: str) -> int:
    return _digest(seat_id)
