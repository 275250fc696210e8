"""Which way of a split a call goes: canaries and versions of a model."""

from collections.abc import Sequence
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

    __slots__ = ("_model", "_shares", "_ways")

    def __init__(self, model: str, ways: Sequence[tuple[str, float]]) -> None:
        """`ways` are models and their weights, above 0."""
        self._model = model
        self._ways = [_Way(name) for name, _ in ways]
        self._shares = list(accumulate(weight for _, weight in ways))

    def choose(self, call: Call) -> str:
        """The model that the call goes to."""
        hints, principal = call.hints, call.principal
        if hints.user:
            who = f"{principal.organisation_id}\0{hints.user}"
        elif hints.session:
            who = f"{principal.id}\0{hints.session}"
        else:
            who = call.call_id
        return pick_sticky(f"{self._model}\0{who}", self._ways, self._shares).seat_id
