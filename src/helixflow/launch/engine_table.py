"""The engine processes that the launcher runs for the pool: by name, with their output as log lines."""

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helixflow.process.lines import LineSplitter, level_of, new_tail
from helixflow.process.loop import Loop, Timer
from helixflow.process.record import RecordLog
from helixflow.process.shim import command
from helixflow.process.spawn import Spawned, spawn

_READ_BYTES = 1 << 16


@dataclass(slots=True)
class _Engine:
    name: str
    child: Spawned
    meta: Any
    started_at: float
    lines: LineSplitter = field(default_factory=LineSplitter)
    tail: "deque[str]" = field(default_factory=new_tail)
    stopping: bool = False
    kill_timer: Timer | None = None


class EngineTable:
    """Starts, stops and reaps engines. Each runs in its own session behind the shim, so it dies with the launcher.

    `on_exit` gets the event that tells the pool: name, status (negative: the signal), whether it was asked to stop,
    meta and the last lines of output. `environ` is the environment that engines start from.
    """

    def __init__(
        self, loop: Loop, log: RecordLog, environ: Mapping[str, str], on_exit: Callable[[dict[str, Any]], None]
    ) -> None:
        self._loop = loop
        self._log = log
        self._environ = environ
        self._on_exit = on_exit
        self._engines: dict[str, _Engine] = {}

    def __len__(self) -> int:
        return len(self._engines)

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str], stdin: bytes, meta: Any) -> int:
        """Returns the process id. Raises `ValueError` for a name in use, `OSError` when nothing can be started."""
        if name in self._engines:
            raise ValueError(f"an engine named {name!r} runs already")
        child = spawn(command(argv, parent=os.getpid()), env={**self._environ, **env}, stdin=stdin, capture=True)
        engine = _Engine(name, child, meta, time.time())
        self._engines[name] = engine
        assert child.output_fd is not None
        self._loop.watch(child.output_fd, lambda: self._take_output(engine))
        self._log.debug("engine.started", engine=name, pid=child.pid)
        return child.pid

    def stop(self, name: str, grace_s: float) -> bool:
        """SIGTERM now and SIGKILL after `grace_s` (0: SIGKILL now). False when no such engine runs."""
        engine = self._engines.get(name)
        if engine is None:
            return False
        engine.stopping = True
        if grace_s <= 0:
            engine.child.kill()
        else:
            engine.child.terminate()
            if engine.kill_timer is None:
                engine.kill_timer = self._loop.call_later(grace_s, engine.child.kill)
        return True

    def stop_all(self, grace_s: float) -> None:
        for name in tuple(self._engines):
            self.stop(name, grace_s)

    def describe(self) -> list[dict[str, Any]]:
        return [
            {
                "name": engine.name,
                "pid": engine.child.pid,
                "meta": engine.meta,
                "started_at": engine.started_at,
                "stopping": engine.stopping,
            }
            for engine in self._engines.values()
        ]

    def reap(self) -> None:
        """Notices engines that have ended; call on SIGCHLD."""
        for engine in tuple(self._engines.values()):
            status = engine.child.poll()
            if status is not None:
                self._finish(engine, status)

    def _take_output(self, engine: _Engine) -> None:
        self._read(engine)

    def _read(self, engine: _Engine) -> bool:
        """Takes what is there; false at the end of the output."""
        fd = engine.child.output_fd
        if fd is None:
            return False
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_output(engine)
        self._write(engine, engine.lines.feed(data) if data else engine.lines.finish())
        return bool(data)

    def _write(self, engine: _Engine, lines: list[str]) -> None:
        for line in lines:
            engine.tail.append(line)
            self._log.write(level_of(line), "engine.output", engine=engine.name, line=line)

    def _close_output(self, engine: _Engine) -> None:
        fd, engine.child.output_fd = engine.child.output_fd, None
        if fd is not None:
            self._loop.watch(fd)
            os.close(fd)

    def _finish(self, engine: _Engine, status: int) -> None:
        engine.child.sweep()
        for _ in range(64):  # more than a full pipe; a grandchild that got away cannot hold us here
            if not self._read(engine):
                break
        self._close_output(engine)
        self._write(engine, engine.lines.finish())
        if engine.kill_timer is not None:
            engine.kill_timer.cancel()
        del self._engines[engine.name]
        level = "debug" if engine.stopping else "warning"
        self._log.write(level, "engine.exited", engine=engine.name, pid=engine.child.pid, status=status)
        self._on_exit(
            {
                "event": "exited",
                "name": engine.name,
                "pid": engine.child.pid,
                "status": status,
                "stopping": engine.stopping,
                "meta": engine.meta,
                "tail": list(engine.tail),
            }
        )
