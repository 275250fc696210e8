"""Which connection a request gets: the decisions, without any I/O."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Pooled(Protocol):
    """What the pool needs to know of a connection."""

    expires_at: float


C = TypeVar("C", bound=Pooled)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Connections open (connecting ones included), idle among them, and requests waiting for one."""

    open: int
    idle: int
    waiting: int


@dataclass(slots=True)
class Waiter(Generic[C]):
    """A request in the queue. `turn` gets a connection, or None: the right to open one."""

    turn: "asyncio.Future[C | None]"
    deadline: float


class OriginPool(Generic[C]):
    """The places and idle connections of one origin, at most `limit` places.

    A place is held from `reserve` (or a turn of None) until `vacate`; idle connections hold theirs. The most recently
    used connection is taken first, so that the others can expire; waiting requests are served first in, first out.
    """

    __slots__ = ("idle", "limit", "open", "waiters")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open = 0
        self.idle: list[C] = []
        self.waiters: deque[Waiter[C]] = deque()

    def take(self, now: float) -> C | None:
        """An idle connection that has not expired."""
        idle = self.idle
        if idle and idle[-1].expires_at > now:
            return idle.pop()
        return None

    def reserve(self) -> bool:
        """A place for a new connection, if there is one."""
        if self.open >= self.limit:
            return False
        self.open += 1
        return True

    def evict(self) -> C | None:
        """The idle connection to give up for a new one: unused for longest. It keeps its place until `vacate`."""
        return self.idle.pop(0) if self.idle else None

    def release(self, connection: C) -> None:
        """The connection is free: the next in the queue gets it, or it becomes idle."""
        waiter = self._next()
        if waiter is None:
            self.idle.append(connection)
        else:
            waiter.turn.set_result(connection)

    def vacate(self) -> None:
        """A place is free: the next in the queue gets it."""
        waiter = self._next()
        if waiter is None:
            self.open -= 1
        else:
            waiter.turn.set_result(None)

    def forget(self, connection: C) -> None:
        """Takes a connection off the idle ones, if it is there."""
        if connection in self.idle:
            self.idle.remove(connection)

    def expired(self, now: float) -> list[C]:
        """The idle connections whose time is over; the caller closes them."""
        return [connection for connection in self.idle if connection.expires_at <= now]

    def overdue(self, now: float) -> list[Waiter[C]]:
        """Takes the requests that waited too long out of the queue, and forgets those that gave up."""
        late = [waiter for waiter in self.waiters if waiter.deadline <= now and not waiter.turn.done()]
        if late or any(waiter.turn.done() for waiter in self.waiters):
            self.waiters = deque(w for w in self.waiters if w.deadline > now and not w.turn.done())
        return late

    def stats(self) -> PoolStats:
        return PoolStats(self.open, len(self.idle), sum(not waiter.turn.done() for waiter in self.waiters))

    def _next(self) -> Waiter[C] | None:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.turn.done():
                return waiter
        return None
