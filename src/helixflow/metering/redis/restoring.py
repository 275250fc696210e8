"""What a gateway tells Redis when it joins, so that each call counts exactly once whatever was lost on the way."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import Struct

from helixflow.metering.redis.calls import Ended, OpenCall, Outbox, Whereabouts
from helixflow.metering.redis.fallback import Fallback
from helixflow.metering.redis.keys import epoch_key
from helixflow.metering.redis.leases import Leases
from helixflow.metering.redis.membership import Luggage

_ENCODE: Final = msgspec.msgpack.Encoder().encode


class _Doubt(Struct):
    """What was sent without an answer, in which generation."""

    generation: int
    calls: list[OpenCall]
    ended: list[Ended]
    spent: Mapping[str, int]


class Restoration:
    """Implements `Traveller`. `position` is where our journal ends now.

    Three things are told: all calls that are open; the ends that Redis has not acknowledged, which count by the
    reservation that they remove, hence once; and what was spent from leases by calls that Redis never had. The last
    would count twice if it were said twice: so when no answer comes, the next hello tells by the generation that Redis
    knows whether it was heard.
    """

    def __init__(
        self,
        calls: Mapping[str, OpenCall],
        outbox: Outbox,
        leases: Leases,
        fallback: Fallback,
        position: Callable[[], int],
    ) -> None:
        self._calls = calls
        self._outbox = outbox
        self._leases = leases
        self._fallback = fallback
        self._position = position
        self._doubt: _Doubt | None = None
        # Of the join that Redis has acknowledged last: what is leased is leased to it.
        self.generation = 0

    @property
    def in_doubt(self) -> bool:
        """Something was packed that Redis has not acknowledged."""
        return self._doubt is not None

    def pack(self, epoch: str, generation: int, before: int) -> Luggage:
        spent: Counter[str] = Counter()
        ended: list[Ended] = []
        doubt, self._doubt = self._doubt, None
        if doubt is not None:
            heard = before in (-1, doubt.generation)
            for call in doubt.calls:
                call.whereabouts = Whereabouts.REDIS if heard else Whereabouts.HERE
            if not heard:
                spent.update(doubt.spent)
                ended += doubt.ended
        spent.update(self._leases.close())
        self._fallback.clear()
        ended += self._outbox.unacknowledged()
        self._outbox.replace(())
        if before < 0:
            # Redis knows nothing of us. What has ended is in our journal before this position, and budgets begin with
            # what the ledger has of it up to there: counting it here would count it twice.
            ended.clear()
            spent.clear()
        unheard = [end for end in ended if end.call is not None and end.call.whereabouts == Whereabouts.HERE]
        for end in unheard:
            assert end.call is not None
            spent.update(dict(end.call.uses(end.tokens, end.cost)))
        ended = [end for end in ended if end.call is None or end.call.whereabouts != Whereabouts.HERE]
        moving = [call for call in self._calls.values() if call.whereabouts == Whereabouts.HERE]
        for call in moving:
            call.whereabouts = Whereabouts.IN_DOUBT
        self._doubt = _Doubt(generation, moving, ended, spent)
        payload = _ENCODE(
            (
                [(call_id, call.reservation(epoch, restored=before < 0)) for call_id, call in self._calls.items()],
                [end.words for end in ended],
                [(epoch_key(epoch, place), amount) for place, amount in spent.items()],
            )
        )
        return Luggage(payload, self._position())

    def arrived(self) -> None:
        doubt, self._doubt = self._doubt, None
        if doubt is None:
            return
        for call in doubt.calls:
            call.whereabouts = Whereabouts.REDIS
        self.generation = doubt.generation
        self._leases.clear()
