"""Group commit: everybody who waits for the disk is released by the same sync."""

import asyncio
import contextlib
from collections.abc import Awaitable
from concurrent.futures import Executor
from typing import Final

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.journal.segments import Segment

RETRY_AFTER_S: Final = 5.0


class Commits:
    """How much of a journal is on the disk.

    After a failed sync the operating system may take pages for clean that never reached the disk. What was not synced
    is therefore written again, from its memory, before the next sync may count.
    """

    def __init__(self, executor: Executor, synced: int) -> None:
        # Of one thread: a sync whose caller was cancelled ends before the next begins.
        self._executor = executor
        # Segments that are full, and not synced since.
        self._finished: list[Segment] = []
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._wanted = asyncio.Event()
        # All before this position is on the disk.
        self.synced = synced
        self.syncs = 0
        self.failed = 0
        # Why the last sync failed, if it did.
        self.failure: OSError | None = None
        self._closed = False

    def finish(self, segment: Segment) -> None:
        """Nothing more is written to `segment`: it is closed once it has been synced."""
        self._finished.append(segment)

    def durable(self, position: int) -> Awaitable[None] | None:
        """None: all before `position` is on the disk. What is returned otherwise may be cancelled.

        It raises `HelixError` UNAVAILABLE when the disk fails.
        """
        if position <= self.synced:
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(_unavailable(self.failure))
            return future
        self._waiters.append((position, future))
        self._wanted.set()
        return future

    async def wanted(self, timeout_s: float) -> None:
        """Returns when somebody waits, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wanted.wait()

    async def sync(self, position: int, current: Segment) -> None:
        """Brings what is before `position` to the disk, in a thread; `failure` says whether that went well."""
        self._wanted.clear()
        if position > self.synced or self.failure is not None:
            loop = asyncio.get_running_loop()
            segments = (*self._finished, current)
            failure = await loop.run_in_executor(self._executor, self._write_out, position, segments)
            self._complete(position, segments, failure)

    def _write_out(self, position: int, segments: tuple[Segment, ...]) -> OSError | None:
        try:
            for segment in segments:
                start, end = max(self.synced, segment.start), min(position, segment.end)
                if self.failure is not None and start < end:
                    segment.write(segment.read(start, end - start), start)
                segment.sync()
        except OSError as exc:
            return exc
        return None

    def _complete(self, position: int, segments: tuple[Segment, ...], failure: OSError | None) -> None:
        self.failure = failure
        if failure is not None:
            self.failed += 1
            self._fail_waiters()
            return
        self.syncs += 1
        self.synced = max(self.synced, position)
        for segment in self._finished:
            if segment in segments:
                segment.close()
        self._finished = [segment for segment in self._finished if segment not in segments]
        waiting, self._waiters = self._waiters, []
        for position, future in waiting:
            if position > self.synced:
                self._waiters.append((position, future))
                self._wanted.set()
            elif not future.done():
                future.set_result(None)

    def close(self) -> None:
        """Nobody waits any longer. Call it after the last `sync`."""
        self._closed = True
        for segment in self._finished:
            segment.close()
        self._finished = []
        self._fail_waiters()

    def _fail_waiters(self) -> None:
        waiting, self._waiters = self._waiters, []
        for _, future in waiting:
            if not future.done():
                future.set_exception(_unavailable(self.failure))


def _unavailable(failure: OSError | None) -> HelixError:
    message = "Usage cannot be recorded at the moment; try again later."
    error = HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=RETRY_AFTER_S)
    error.__cause__ = failure
    return error
