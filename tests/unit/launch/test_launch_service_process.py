"""When a service that ends is started again: no process, no clock."""

import os
from collections.abc import Callable
from io import StringIO
from typing import Any

from helixflow.core.errors import ExitCode
from helixflow.launch.service_process import ServiceProcess
from helixflow.process.loop import Loop, Timer
from helixflow.process.record import RecordLog


class ManualLoop(Loop):
    """Time passes when `advance` says so; descriptors are not watched."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.timers: list[tuple[float, Timer, Callable[[], None]]] = []
        self.readers: dict[int, Callable[[], None]] = {}

    def now(self) -> float:
        return self.time

    def watch(
        self, fd: int, on_read: Callable[[], None] | None = None, on_write: Callable[[], None] | None = None
    ) -> None:
        self.readers.pop(fd, None)
        if on_read is not None:
            self.readers[fd] = on_read

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self.time + delay_s, 0, callback)
        self.timers.append((self.time + delay_s, timer, callback))
        return timer
