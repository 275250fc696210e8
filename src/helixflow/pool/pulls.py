"""Pulls that are under way: of several who want the same model one works, and all see how far it is."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.manifest import StoredModel
from helixflow.pool.progress import PullProgress, Report

# `ModelStore.pull`; blocks, so it is run in a thread.
Pull = Callable[[ModelSpec, Report], StoredModel]
# Threads are made when they are needed: those that wait for the store must not use up the default executor.
_MAX_THREADS: Final = 256


class _PullAbandonedError(Exception):
    """Raised within a pull that nobody waits for any more, to end it."""


@dataclass(slots=True)
class _Running:
    """One pull and who hears of its progress."""

    task: "asyncio.Future[StoredModel]"
    abandoned: threading.Event
    listeners: list[Report] = field(default_factory=list)


class Pulls:
    """`pull` joins a pull of the same model. Close it at the end: what still runs ends at its next report."""

    def __init__(self, pull: Pull) -> None:
        self._pull = pull
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="pull")
        self._running: dict[str, _Running] = {}

    async def pull(self, spec: ModelSpec, report: Report) -> StoredModel:
        """The model from the store; `report` is called on the event loop. Raises what the store's `pull` does.

        When the last of those who wait for a pull is cancelled, it ends at its next report of progress.
        """
        key = repr(spec)
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = self._start(key, spec)
        running.listeners.append(report)
        try:
            return await asyncio.shield(running.task)
        finally:
            running.listeners.remove(report)
            if not running.listeners and not running.task.done():
                running.abandoned.set()
                self._forget(key, running)

    def close(self) -> None:
        for running in self._running.values():
            running.abandoned.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, key: str, spec: ModelSpec) -> _Running:
        loop = asyncio.get_running_loop()
        abandoned = threading.Event()

        def report(progress: PullProgress) -> None:
            if abandoned.is_set():
                raise _PullAbandonedError
            loop.call_soon_threadsafe(self._tell, key, progress)

        running = _Running(loop.run_in_executor(self._threads, self._pull, spec, report), abandoned)
        running.task.add_done_callback(lambda task: self._finish(key, running, task))
        return running

    def _tell(self, key: str, progress: PullProgress) -> None:
        running = self._running.get(key)
        for listener in tuple(running.listeners) if running is not None else ():
            listener(progress)

    def _finish(self, key: str, running: _Running, task: "asyncio.Future[StoredModel]") -> None:
        self._forget(key, running)
        if not task.cancelled():
            task.exception()  # nobody may be waiting any more; that is no error of its own

    def _forget(self, key: str, running: _Running) -> None:
        if self._running.get(key) is running:
            del self._running[key]
