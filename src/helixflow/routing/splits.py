"""Which way of a split a call goes: canaries and versions of a model."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from helixflow.core.call import Call
from helixflow.routing.rendezvous import pick_sticky


@dataclass(frozen=True, slots=True)
class _Way:
    seat_id: str


class Splitter:
    """Weighted, and without a memory: in all gateways, and after a restart, a user goes the same way.

    Who is meant by "the same" is the user that the request names (`call.hints.user`), within its organisation; without
    one its session, of its API key. Requests that name neither are shared out one by one. When weights change, only as
    many users change their way as must.
    """

    __slots__ = ("_model", "_shares", "_ways", "_weights")

    def __init__(self, model: str, ways: Sequence[tuple[str, float]]) -> None:
        """`ways` are models and their weights, above 0."""
        self._model = model
        self._ways = [_Way(name) for name, _ in ways]
        self._weights = [weight for _, weight in ways]
        self._shares = list(accumulate(self._weights))

    def choose(self, call: Call, among: Collection[str] | None = None) -> str:
        """The model that the call goes to: of all, or of those `among` them (at least one). Who goes one of these ways
        anyway goes it then too.
        """
        hints, principal = call.hints, call.principal
        if hints.user:
            who = f"{principal.organisation_id}\0{hints.user}"
        elif hints.session:
            who = f"{principal.id}\0{hints.session}"
        else:
            who = call.call_id
        key = f"{self._model}\0{who}"
        if among is None or len(among) == len(self._ways):
            return pick_sticky(key, self._ways, self._shares).seat_id
        left = [(way, weight) for way, weight in zip(self._ways, self._weights, strict=True) if way.seat_id in among]
        return pick_sticky(key, [way for way, _ in left], list(accumulate(weight for _, weight in left))).seat_id
