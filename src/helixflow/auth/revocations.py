"""Fans revocations out to everybody who watches."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from helixflow.auth.keys import Revocation
from helixflow.core.errors import ErrorKind, HelixError

# A watcher this far behind is cut off: it comes back, sees another revision and forgets all, which is right and cheap.
QUEUE_LENGTH: Final = 1024


class RevocationFeed:
    """The current revision, and a bounded queue for each watcher. Used from one event loop."""

    def __init__(self, revision: int, queue_length: int = QUEUE_LENGTH) -> None:
        self.revision = revision
        self._queue_length = queue_length
        self._watchers: set[_Watcher] = set()
        self._closed = False

    def publish(self, revocation: Revocation) -> None:
        """Tells all watchers. A watcher whose queue is full is cut off."""
        self.revision = max(self.revision, revocation.revision)
        for watcher in list(self._watchers):
            if not watcher.offer(revocation):
                self._watchers.discard(watcher)

    async def watch(self) -> AsyncIterator[Revocation]:
        """First the current revision with an empty hash, then revocations as they happen.

        Ends with `HelixError`: OVERLOADED for a watcher that is too slow, SHUTTING_DOWN after `close`.
        """
        if self._closed:
            raise HelixError(ErrorKind.SHUTTING_DOWN, "The auth service is shutting down.")
        watcher = _Watcher(self._queue_length)
        self._watchers.add(watcher)
        # Between reading the revision and joining the watchers nothing can be published: there is no await.
        first = Revocation(self.revision, b"")
        try:
            yield first
            while True:
                yield await watcher.take()
        finally:
            self._watchers.discard(watcher)

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def close(self) -> None:
        """Ends all watches. Idempotent."""
        self._closed = True
        for watcher in self._watchers:
            watcher.cut(HelixError(ErrorKind.SHUTTING_DOWN, "The auth service is shutting down."))
        self._watchers.clear()


class _Watcher:
    """Revocations on their way to one watcher."""

    def __init__(self, length: int) -> None:
        # One place more than is offered, so that the reason for a cut always fits.
        self._queue: asyncio.Queue[Revocation | HelixError] = asyncio.Queue(length + 1)
        self._length = length

    def offer(self, revocation: Revocation) -> bool:
        """False when the watcher is too slow and was cut off."""
        if self._queue.qsize() < self._length:
            self._queue.put_nowait(revocation)
            return True
        self.cut(HelixError(ErrorKind.OVERLOADED, "The watcher reads too slowly."))
        return False

    def cut(self, reason: HelixError) -> None:
        self._queue.put_nowait(reason)

    async def take(self) -> Revocation:
        item = await self._queue.get()
        if isinstance(item, HelixError):
            raise item
        return item
