"""The same one of several for the same key, without remembering anything: weighted rendezvous hashing.

All gateways choose alike, and when one of several goes, comes or changes its weight, only the keys move that must.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import log
from typing import Final, Protocol, TypeVar
from zlib import crc32

_MASK: Final = 2**64 - 1
# Odd constants without structure (fractions of the golden ratio and of the root of two).
_SPREAD: Final = 0x9E3779B97F4A7C15
_MIX: Final = 0x6A09E667F3BCC909


class Named(Protocol):
    """What a key can be given to: the same one has the same `seat_id` in all processes."""

    @property
    def seat_id(self) -> str: ...


AnyNamed = TypeVar("AnyNamed", bound=Named)


def pick_sticky(key: str, seats: Sequence[AnyNamed], shares: Sequence[float] | None = None) -> AnyNamed:
    """The seat of `key`. `shares` are the running sums of the seats' weights; None when all weigh the same."""
    drawn = int.from_bytes(blake2b(key.encode(), digest_size=8).digest())
    # A pseudo-random number for each pair of key and seat; the highest wins.
    numbers = [((drawn ^ crc32(seat.seat_id.encode()) * _SPREAD) & _MASK) * _MIX & _MASK for seat in seats]
    if shares is None:
        return seats[numbers.index(max(numbers))]
    scores = []
    before = 0.0
    for number, running in zip(numbers, shares, strict=True):
        scores.append((before - running) / log((number + 0.5) / 2**64))
        before = running
    return seats[scores.index(max(scores))]
