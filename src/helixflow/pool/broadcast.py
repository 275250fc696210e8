"""Telling any number of watchers that something changed, without queues: each sees the latest state, however slow."""

import asyncio


class Broadcast:
    """A revision that grows. Watchers wait for one beyond what they have seen; changes in between are merged."""

    def __init__(self) -> None:
        self.revision = 1
        self.is_closed = False
        self._next = asyncio.Event()

    def bump(self) -> None:
        self.revision += 1
        waiting, self._next = self._next, asyncio.Event()
        waiting.set()

    def close(self) -> None:
        """Wakes all watchers for the last time; `is_closed` tells them so."""
        self.is_closed = True
        self.bump()

    async def wait_beyond(self, revision: int) -> int:
        """Returns the current revision once it is greater than `revision`."""
        while self.revision <= revision:
            await self._next.wait()
        return self.revision
