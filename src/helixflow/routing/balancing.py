"""Which one of several gets a call: decided without I/O, for the deployments of a tier and for the replicas of a
deployment alike.
"""

import random
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from helixflow.core.call import Call
from helixflow.core.clock import Clock
from helixflow.routing.affinity import PrefixTable
from helixflow.routing.rendezvous import pick_sticky
from helixflow.settings.serving import RoutingSettings

# How far latencies count: who is still unmeasured, or was slow for another reason, is neither flooded nor starved.
_MOST_LATENCY_RATIO: Final = 4.0
# Of seats with unequal weights the one that was drawn keeps the call, unless it is so much busier than its share.
_SHARE_SLACK: Final = 2.0
# Part of its capacity that a seat may have more to do than another and still get a prompt that it knows: reading that
# anew elsewhere takes longer than the wait, and makes the other seat drop one that it knows. But not where all prompts
# begin alike: that beginning is worth having on every seat.
_SLACK: Final = 0.75
_CALL_WEIGHT: Final = 0.125
_MONOTONOUS: Final = 0.6


class Seat(Protocol):
    """Something that calls can be given to.

    `in_flight` calls are with it now, of `capacity` that it can take well (never 0). `latency_s` is how long its
    answers lately took to begin, `whole_latency_s` how long those took of which only the whole was seen; 0.0 while that
    is not known. Neither is asked unless it `is_measured`.
    """

    @property
    def seat_id(self) -> str: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def is_measured(self) -> bool: ...

    def latency_s(self, now: float) -> float: ...

    def whole_latency_s(self, now: float) -> float: ...


AnySeat = TypeVar("AnySeat", bound=Seat)


class Balancer:
    """Affinity where a seat probably has the beginning of the prompt in its cache, or the session's; else the power of
    two choices.

    Affinity yields to load: a seat is preferred only while its load is at most `load_guard` times that of the one that
    would be taken otherwise (of two: the less loaded one), and some calls more where most of the prompt is known. Not
    that of the least loaded one of all: among many some seat is always idle, and nobody would return to anywhere. Where
    all prompts begin alike, a seat is preferred only to one that has as much to do.

    `monotonic` is the clock of `Seat.latency_s`, `random_unit` gives floats from 0 to below 1.
    """

    def __init__(
        self,
        prefixes: PrefixTable,
        *,
        load_guard: float,
        monotonic: Callable[[], float],
        random_unit: Callable[[], float],
    ) -> None:
        self._prefixes = prefixes
        self._load_guard = load_guard
        self._now = monotonic
        self._random_unit = random_unit
        self._varieties: dict[str, _Variety] = {}

    @classmethod
    def of(cls, routing: RoutingSettings, clock: Clock) -> "Balancer":
        """With a table of its own for all that is balanced in this process."""
        prefixes = PrefixTable(entries=routing.prefix_entries, block_bytes=routing.prefix_block_bytes)
        return cls(prefixes, load_guard=routing.load_guard, monotonic=clock.monotonic, random_unit=random.random)

    def choose(
        self,
        seats: Sequence[AnySeat],
        call: Call,
        scope: str,
        *,
        affinity: bool = True,
        shares: Sequence[float] | None = None,
    ) -> AnySeat:
        """One of `seats`, which are those that may have the call now: at least one.

        `scope` names what they are the seats of: beginnings are remembered by it. `shares` are the running sums of the
        seats' weights; None when all weigh the same. Not to be asked where there is only ever one seat: what it
        remembers would be of no use.
        """
        prefixes = self._prefixes
        session = call.hints.session
        if session:
            chain = prefixes.session(scope, call)
        elif not affinity or not (chain := prefixes.chain(scope, call)):
            return self._spread(seats, shares)
        variety = self._varieties.get(scope)
        if variety is None:
            variety = self._varieties[scope] = _Variety()
        monotonous = variety.add(chain[0])
        preferred: AnySeat | None = None
        seat_id, matched = prefixes.find(chain)
        if matched:
            for seat in seats:
                if seat.seat_id == seat_id:
                    preferred = seat
                    break
        if preferred is None and session:
            # All gateways begin with the same one. Apart for each organisation, as everything here.
            preferred = pick_sticky(f"{scope}\0{call.principal.organisation_id}\0{session}", seats, shares)
        chosen = self._spread(seats, shares, prefixes.burden)
        new = True
        if preferred is not None:
            much = session != "" or matched * 2 >= len(chain)
            allowed = (chosen.in_flight + 1) / chosen.capacity * preferred.capacity
            if not monotonous:
                allowed *= self._load_guard
                if much:
                    allowed += max(1.0, preferred.capacity * _SLACK)
            if preferred.in_flight + 1 <= allowed:
                chosen = preferred
                new = not much
        prefixes.remember(chain, chosen.seat_id, new=new)
        return chosen

    def forget(self, seat_id: str) -> None:
        """It has ended, and its caches with it."""
        self._prefixes.forget(seat_id)

    def _spread(
        self, seats: Sequence[AnySeat], shares: Sequence[float] | None, burden: Callable[[str], float] | None = None
    ) -> AnySeat:
        """Two are drawn by weight, and the one with less to do is taken; of equals that with less of a `burden`."""
        count = len(seats)
        if count == 1:
            return seats[0]
        if shares is None:
            first = int(self._random_unit() * count)
            second = int(self._random_unit() * (count - 1))
            one, other = seats[first], seats[second if second < first else second + 1]
            ratio = self._load_ratio(one, other)
            if ratio == 1 and burden is not None:
                ratio += burden(one.seat_id) - burden(other.seat_id)
            return one if ratio <= 1 else other
        whole = shares[-1]
        first = bisect(shares, self._random_unit() * whole, hi=count - 1)
        second = bisect(shares, self._random_unit() * whole, hi=count - 1)
        if first == second:
            return seats[first]
        # Weights are kept but for who is much busier than by its share: one call more or less says nothing.
        flying = sum([seat.in_flight for seat in seats])
        one, other = seats[first], seats[second]
        expected = flying * _share(shares, first) + 1
        expected_other = flying * _share(shares, second) + 1
        busier = (one.in_flight + 1) * expected_other / ((other.in_flight + 1) * expected)
        return other if busier > _SHARE_SLACK else one

    def _load_ratio(self, one: Seat, other: Seat) -> float:
        """How much longer a call would wait for `one` than for `other`, as far as that can be told."""
        ratio = (one.in_flight + 1) * other.capacity / ((other.in_flight + 1) * one.capacity)
        if not one.is_measured:
            return ratio
        now = self._now()
        latency, latency_of_other = one.latency_s(now), other.latency_s(now)
        if not (latency and latency_of_other):
            latency, latency_of_other = one.whole_latency_s(now), other.whole_latency_s(now)
        if latency and latency_of_other:
            ratio *= min(max(latency / latency_of_other, 1 / _MOST_LATENCY_RATIO), _MOST_LATENCY_RATIO)
        return ratio


class _Variety:
    """Whether calls lately began alike."""

    __slots__ = ("_before", "_repeated")

    def __init__(self) -> None:
        self._before = 0
        self._repeated = 1.0  # until others are seen

    def add(self, beginning: int) -> bool:
        """Takes in one more call; whether nearly all of the last ones began as the one before them."""
        self._repeated += ((beginning == self._before) - self._repeated) * _CALL_WEIGHT
        self._before = beginning
        return self._repeated > _MONOTONOUS


def _share(shares: Sequence[float], index: int) -> float:
    before = shares[index - 1] if index else 0.0
    return (shares[index] - before) / shares[-1]
