"""When a service that ends is started again: no process, no clock."""

import json
import os
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest

from helixflow.core.errors import ExitCode
from helixflow.launch.service_process import ServiceProcess
from helixflow.process.loop import Callback, Loop
from helixflow.process.record import RecordLog


class ManualLoop(Loop):
    """Time is what `time` says; descriptors are read when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0
        self.readers: dict[int, Callback] = {}

    def now(self) -> float:
        return self.time

    def watch(self, fd: int, on_read: Callback | None = None, on_write: Callback | None = None) -> None:
        self.readers.pop(fd, None)
        if on_read is not None:
            self.readers[fd] = on_read

    def advance(self, seconds: float) -> None:
        self.time += seconds
        self._run_timers()


class FakeChild:
    pid = 1

    def __init__(self) -> None:
        self.status: int | None = None

    def poll(self) -> int | None:
        return self.status

    def sweep(self) -> None:
        """There is no group."""


class Service:
    """A service process over children that exist only here."""

    def __init__(self) -> None:
        self.loop, self.output = ManualLoop(), StringIO()
        self.children: list[FakeChild] = []
        self.fatal: list[int] = []
        self.ready_fd = -1
        self.fails_to_start = False
        log = RecordLog(self.output, level="debug", format="json", service="launcher")
        start: Callable[[int], Any] = self._start
        self.process = ServiceProcess(
            "control",
            self.loop,
            log,
            start,
            on_ready=lambda: None,
            on_fatal=lambda exit_code, _reason: self.fatal.append(exit_code),
        )
        self.process.start()

    def _start(self, ready_fd: int) -> FakeChild:
        if self.fails_to_start:
            raise OSError("no more processes")
        self.children.append(FakeChild())
        self.ready_fd = os.dup(ready_fd)
        return self.children[-1]

    def become_ready(self) -> None:
        os.write(self.ready_fd, b"x")
        (read,) = self.loop.readers.values()
        read()
        assert self.process.is_ready

    def end(self, status: int) -> None:
        os.close(self.ready_fd)
        self.children[-1].status = status
        self.process.reap()

    def records(self, event: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.output.getvalue().splitlines()]
        return [record for record in found if record["event"] == event]


def test_a_service_that_never_served_is_given_up_in_a_crash_loop() -> None:
    service = Service()
    for _ in range(5):
        service.end(1)
        service.loop.advance(10)
    assert service.fatal == [ExitCode.UNAVAILABLE]
    assert len(service.children) == 5


@pytest.mark.parametrize("status", [1, ExitCode.STORAGE, ExitCode.CONFIG])
def test_a_service_that_has_served_is_restarted_for_ever_with_longer_pauses(status: int) -> None:
    service = Service()
    service.become_ready()
    for count in range(1, 13):
        service.end(status)
        assert len(service.children) == count
        service.loop.advance(30)
        assert len(service.children) == count + 1
    assert service.fatal == []
    pauses = service.records("process.exited")
    assert pauses[0]["restart_in_s"] < 1
    assert all(20 < record["restart_in_s"] <= 30 for record in pauses[-3:])
    assert pauses[0]["level"] == "warning"


def test_a_crash_loop_after_service_is_logged_as_an_error() -> None:
    service = Service()
    service.become_ready()
    for _ in range(5):
        service.end(1)
        service.loop.advance(10)
    assert [record["level"] for record in service.records("process.exited")] == ["warning"] * 4 + ["error"]
    service.become_ready()


def test_a_service_that_cannot_be_spawned_again_is_tried_again() -> None:
    service = Service()
    service.become_ready()
    service.fails_to_start = True
    service.end(1)
    service.loop.advance(30)
    assert service.fatal == []
    assert service.records("process.unstartable")[0]["reason"] == "no more processes"
    service.fails_to_start = False
    service.loop.advance(30)
    assert len(service.children) == 2
