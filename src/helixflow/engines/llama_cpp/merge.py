"""Several generations of one call read as one: `n` choices, several prompts, `best_of`."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from helixflow.core.capacity import Slots


class Running(Protocol):
    """One generation under way: on one replica, or going on on others."""

    fingerprint: str
    prompt_tokens: int

    async def read(self) -> list[bytes]:
        """The next events, an empty list at the end. Raises `HelixError` when it fails."""
        ...

    def close(self) -> None: ...


Start = Callable[[], Awaitable[Running]]


class Source(Protocol):
    """Events of one or more generations, in the order they come."""

    fingerprint: str
    prompt_tokens: int

    async def read(self) -> tuple[int, list[bytes]]:
        """`(index, events)`; no events when that generation is complete; index -1 when all are.

        Raises `HelixError` when any of them fails.
        """
        ...

    def close(self) -> None: ...


class Single:
    """One generation, without a task of its own: the common case."""

    def __init__(self, generation: Running) -> None:
        self._generation = generation
        self.fingerprint = generation.fingerprint
        self.prompt_tokens = generation.prompt_tokens
        self._ended = False

    async def read(self) -> tuple[int, list[bytes]]:
        if self._ended:
            return -1, []
        events = await self._generation.read()
        self._ended = not events
        return 0, events

    def close(self) -> None:
        self._generation.close()


class Merged:
    """Owns a task a generation. At most `at_once` run or wait for a slot, so that one call cannot fill the queue."""

    def __init__(self, starts: Sequence[Start], at_once: int) -> None:
        self.fingerprint = ""
        self.prompt_tokens = 0
        self._queue: asyncio.Queue[tuple[int, list[bytes] | Exception]] = asyncio.Queue(maxsize=len(starts))
        self._running = len(starts)
        self._turns = asyncio.Semaphore(at_once)
        self._tasks = [asyncio.create_task(self._pump(index, start)) for index, start in enumerate(starts)]

    async def read(self) -> tuple[int, list[bytes]]:
        if not self._running:
            return -1, []
        index, events = await self._queue.get()
        if isinstance(events, Exception):
            raise events
        if not events:
            self._running -= 1
        return index, events

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _pump(self, index: int, start: Start) -> None:
        try:
            async with self._turns:
                generation = await start()
                self.fingerprint = generation.fingerprint
                self.prompt_tokens = generation.prompt_tokens
                try:
                    while events := await generation.read():
                        await self._queue.put((index, events))
                finally:
                    generation.close()
            await self._queue.put((index, []))
        except Exception as exc:  # noqa: BLE001  (handed to the reader, who raises it)
            await self._queue.put((index, exc))


async def open_source(starts: Sequence[Start], slots: Slots, deadline: float) -> tuple[Source, tuple[int, list[bytes]]]:
    """The source and its first events. Raises `HelixError` when nothing could be started."""
    source: Source
    if len(starts) == 1:
        source = Single(await starts[0]())
    else:
        source = Merged(starts, at_once=(await slots.any_replica(deadline)).slots)
    try:
        return source, await source.read()
    except BaseException:
        source.close()
        raise
