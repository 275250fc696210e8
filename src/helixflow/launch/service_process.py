"""One of our own long-running processes (control, a gateway), kept alive by the launcher."""

import os
from collections.abc import Callable
from typing import Final

from helixflow.core.errors import ExitCode
from helixflow.process.backoff import Backoff, CrashLoop
from helixflow.process.loop import Loop, Timer
from helixflow.process.record import RecordLog
from helixflow.process.spawn import Spawned

READY_TIMEOUT_S: Final = 120.0
# Each of its lives was of use to somebody, and a start a second harms nobody.
SERVED_PAUSE_S: Final = 1.0
# What a restart cannot mend; the process has said why on its standard error.
_FINAL: Final = frozenset({ExitCode.CONFIG, ExitCode.PORT_BUSY, ExitCode.MODEL, ExitCode.STORAGE})


class ServiceProcess:
    """Starts, restarts and stops one process. `start_child(ready_fd)` spawns it.

    `on_ready` is called each time it reports that it serves. `on_fatal(exit_code, reason)` is called only while it has
    never served, when restarting makes no sense: it ended with an exit code that says so, or it is in a crash loop.
    Once it has served it is restarted for ever, with longer and longer pauses: what is down with it may come back
    (a database, room on the disk), and the other processes serve meanwhile. One that was serving when it ended is back
    within `SERVED_PAUSE_S`, however often that happens.
    """

    def __init__(
        self,
        name: str,
        loop: Loop,
        log: RecordLog,
        start_child: Callable[[int], Spawned],
        *,
        on_ready: Callable[[], None],
        on_fatal: Callable[[int, str], None],
    ) -> None:
        self.name = name
        self.is_ready = False
        self._loop = loop
        self._log = log
        self._start_child = start_child
        self._on_ready = on_ready
        self._on_fatal = on_fatal
        self._child: Spawned | None = None
        self._keep = True
        self._was_ready = False
        self._ready_at = 0.0
        self._ready_fd: int | None = None
        self._timer: Timer | None = None
        self._backoff = Backoff()
        self._crashes = CrashLoop()

    @property
    def is_running(self) -> bool:
        return self._child is not None

    def start(self) -> None:
        """Starts it (again), unless it is being stopped."""
        if not self._keep or self._child is not None:
            return
        ready_read, ready_write = os.pipe()
        try:
            self._child = self._start_child(ready_write)
        except OSError as exc:
            os.close(ready_read)
            if self._was_ready:
                delay_s = self._restart_later(0.0)
                self._log.error("process.unstartable", process=self.name, reason=str(exc), restart_in_s=delay_s)
            else:
                self._on_fatal(ExitCode.UNAVAILABLE, f"{self.name} cannot be started: {exc}")
            return
        finally:
            os.close(ready_write)
        self._ready_fd = ready_read
        self._loop.watch(ready_read, self._take_ready)
        self._timer = self._loop.call_later(READY_TIMEOUT_S, self._give_up_waiting)
        self._log.debug("process.started", process=self.name, pid=self._child.pid)

    def stop(self) -> None:
        """SIGTERM, and no restart after it."""
        self._keep = False
        self._cancel_timer()
        if self._child is not None:
            self._child.terminate()

    def kill(self) -> None:
        self._keep = False
        if self._child is not None:
            self._child.kill()

    def reap(self) -> None:
        """Notices that it has ended; call on SIGCHLD."""
        status = self._child.poll() if self._child is not None else None
        if self._child is None or status is None:
            return
        pid = self._child.pid
        self._child.sweep()
        self._child = None
        served = self.is_ready
        healthy_s = self._loop.now() - self._ready_at if served else 0.0
        self.is_ready = False
        self._forget_ready_pipe()
        self._cancel_timer()
        if not self._keep:
            self._log.debug("process.exited", process=self.name, pid=pid, status=status)
            return
        if not self._was_ready and status in _FINAL:
            self._on_fatal(status, f"{self.name} could not start")
            return
        in_loop = self._crashes.record_exit(self._loop.now())
        if in_loop and not self._was_ready:
            self._on_fatal(ExitCode.UNAVAILABLE, f"{self.name} keeps ending (last status {status}): giving up")
            return
        level, delay_s = (
            "error" if in_loop else "warning",
            self._restart_later(healthy_s, SERVED_PAUSE_S if served else None),
        )
        self._log.write(level, "process.exited", process=self.name, pid=pid, status=status, restart_in_s=delay_s)

    def _restart_later(self, healthy_s: float, longest_s: float | None = None) -> float:
        """Starts it again after the backoff's delay in seconds, which is returned rounded, for the log."""
        delay_s = self._backoff.next_delay_s(healthy_s)
        if longest_s is not None:
            delay_s = min(delay_s, longest_s)
        self._timer = self._loop.call_later(delay_s, self.start)
        return round(delay_s, 2)

    def _take_ready(self) -> None:
        assert self._ready_fd is not None
        said = os.read(self._ready_fd, 1)
        self._forget_ready_pipe()
        if said:
            self._cancel_timer()
            self.is_ready = self._was_ready = True
            self._ready_at = self._loop.now()
            self._log.debug("process.ready", process=self.name)
            self._on_ready()

    def _give_up_waiting(self) -> None:
        self._log.error("process.hung", process=self.name, waited_s=READY_TIMEOUT_S)
        if self._child is not None:
            self._child.kill()

    def _forget_ready_pipe(self) -> None:
        if self._ready_fd is not None:
            self._loop.watch(self._ready_fd)
            os.close(self._ready_fd)
            self._ready_fd = None

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
