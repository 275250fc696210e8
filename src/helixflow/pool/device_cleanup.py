"""Processes of ours that are left on a GPU without their replica: found by a mark in their environment, and killed.

An engine's own processes end with it (`process.family`); what got away all the same would hold memory for ever. Others'
processes have no mark, and those of another HelixFlow on the same machine have another owner's.
"""

import asyncio
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import structlog

from helixflow.pool.devices import DeviceProcess
from helixflow.pool.launcher_client import Engines, RunningEngine

MARK: Final = "HELIXFLOW_REPLICA"
# Twice seen so long apart: an engine that is being ended has gone by then.
_LOOK_S: Final = 30.0
log = structlog.get_logger("helixflow.pool")


def owner_of(data_dir: Path) -> str:
    """Names this installation in marks."""
    return hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]


class MarkedEngines:
    """`Engines` whose processes, and all that they start, carry their replica's name and `owner` in the environment.

    What the variables in `hidden` hold is not for them: the launcher knows only those of its own start.
    """

    def __init__(self, engines: Engines, owner: str) -> None:
        self._engines = engines
        self._owner = owner
        self.hidden: frozenset[str] = frozenset()

    async def start(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], stdin: str, meta: Mapping[str, Any]
    ) -> RunningEngine:
        marked = {**dict.fromkeys(self.hidden, ""), **env, MARK: f"{self._owner}:{name}"}
        return await self._engines.start(name, argv, env=marked, stdin=stdin, meta=meta)

    async def stop(self, name: str, grace_s: float) -> None:
        await self._engines.stop(name, grace_s)

    async def list(self) -> tuple[RunningEngine, ...]:
        return await self._engines.list()


class DeviceCleaner:
    """`run` looks until cancelled. `processes` are those on devices now; it blocks and is called in a thread."""

    def __init__(
        self,
        processes: Callable[[], Sequence[DeviceProcess]],
        engines: Engines,
        owner: str,
        *,
        interval_s: float = _LOOK_S,
    ) -> None:
        self._processes = processes
        self._engines = engines
        self._owner = owner
        self._interval_s = interval_s
        self._suspects: set[psutil.Process] = set()

    async def run(self) -> None:
        """Raises `HelixError` (UNAVAILABLE) when the launcher is lost."""
        while True:
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> None:
        """Kills what was without its replica the last time and is so still."""
        # Processes before engines: one that has started meanwhile is then known as an engine, if it is one.
        ours = await asyncio.to_thread(lambda: our_processes({one.pid for one in self._processes()}, self._owner))
        running = {engine.name for engine in await self._engines.list()}
        strays = {process for process, replica in ours.items() if replica not in running}
        for process in strays & self._suspects:
            log.warning("device.cleaned", replica=ours[process], pid=process.pid)
            try:
                process.kill()
            except psutil.Error as exc:
                log.warning("device.not_cleaned", pid=process.pid, reason=str(exc))
        self._suspects = strays


def our_processes(pids: Collection[int], owner: str) -> dict[psutil.Process, str]:
    """Which of these carry `owner`'s mark, and the replica that it names. Blocks.

    A process that cannot be asked is not ours: it has ended, is another user's, or of another process namespace.
    """
    ours = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            found, _, replica = process.environ().get(MARK, "").partition(":")
        except (psutil.Error, OSError):
            continue
        if found == owner and replica:
            ours[process] = replica
    return ours
