"""The calls of this gateway that are under way, and the ends that Redis may not know of yet."""

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final

from msgspec import Struct

from helixflow.metering.gcra import Bucket
from helixflow.metering.redis.connection import Answer, Lost
from helixflow.metering.redis.plan import Plan, Reservation, Whose

# Tokens of a call that has never been.
NEVER_WAS: Final = -1


class Whereabouts(IntEnum):
    """Where what a call has reserved is counted."""

    REDIS = 0
    # In a lease and in this gateway's share of limits.
    HERE = 1
    # It is on its way from here to Redis, and the answer has not come.
    IN_DOUBT = 2


class OpenCall(Struct, gc=False):
    """A call that is granted and has not ended. `charges` are what it took from local rates, in the plan's order."""

    plan: Plan
    tokens: int
    tokens_bound: int
    cost_bound: int
    whose: Whose
    whereabouts: int
    charges: tuple[tuple[Bucket, int], ...] = ()
    # False for a call that was granted without Redis: the rates there have not been charged.
    charged: bool = True

    def reservation(self, epoch: str, *, restored: bool) -> Reservation:
        return self.plan.reservation(
            epoch,
            self.tokens,
            self.tokens_bound,
            self.cost_bound,
            self.whose,
            charged=self.charged,
            restored=restored,
        )

    def uses(self, tokens: int, cost: int) -> list[tuple[str, int]]:
        """What its end adds to what budgets have spent, by their places."""
        if tokens < 0:
            return []
        return [(kept.place, cost if kept.is_money else tokens) for kept in self.plan.budgets]


class Ended(Struct, frozen=True, gc=False):
    """The end of a call as the scripts want it; `call` is None where this gateway never had it."""

    call_id: str
    tokens: int
    cost: int
    position: int
    call: OpenCall | None = None

    @property
    def words(self) -> tuple[str, int, int, int]:
        return self.call_id, self.tokens, self.cost, self.position


class Outbox:
    """Ends of calls on their way to Redis. One is kept until Redis has acknowledged it; sent twice it counts once."""

    def __init__(self) -> None:
        self._waiting: list[Ended] = []
        self._sent: dict[Answer, list[Ended]] = {}

    def __len__(self) -> int:
        return len(self._waiting) + sum(map(len, self._sent.values()))

    def add(self, ended: Ended) -> bool:
        """True when it is the first: somebody has to see that it is sent."""
        self._waiting.append(ended)
        return len(self._waiting) == 1

    def send(self, send: Callable[[list[tuple[str, int, int, int]]], Answer]) -> None:
        """All that waits, in one command."""
        if not self._waiting:
            return
        batch, self._waiting = self._waiting, []
        answer = send([ended.words for ended in batch])
        self._sent[answer] = batch
        answer.add_done_callback(self._acknowledge)

    def under_way(self) -> list[Answer]:
        return list(self._sent)

    def unacknowledged(self) -> list[Ended]:
        """In the order of their ends."""
        return [*(ended for batch in self._sent.values() for ended in batch), *self._waiting]

    def replace(self, ended: Iterable[Ended]) -> None:
        """What is unacknowledged from now on."""
        self._sent.clear()
        self._waiting = list(ended)

    def _acknowledge(self, answer: Answer) -> None:
        batch = self._sent.pop(answer, None)
        if batch is not None and type(answer.result()) is Lost:
            self._waiting[:0] = batch
