"""Processes under test: started pinned to a core, watched, ended with everything below them."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

GATEWAY_CORE = 0
LOAD_CORE = 1
START_TIMEOUT_S = 90.0


def pin(core: int | None) -> None:
    """Binds this process to `core`, where the platform can and the machine has it."""
    if core is not None and hasattr(os, "sched_setaffinity") and core < (os.cpu_count() or 1):
        os.sched_setaffinity(0, {core})


def pin_tree(pid: int, cores: set[int]) -> None:
    """Binds every thread of a running process to `cores`."""
    if hasattr(os, "sched_setaffinity") and max(cores) < (os.cpu_count() or 1):
        for thread in psutil.Process(pid).threads():
            with contextlib.suppress(ProcessLookupError):  # a thread may end meanwhile
                os.sched_setaffinity(thread.id, cores)


@contextlib.contextmanager
def serving(module: str, *arguments: str) -> Iterator[tuple[int, int]]:
    """Runs `python -m module`, which prints the port it listens on; gives (pid, port)."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process.pid, int(_read_line(process))
    finally:
        end_tree(process.pid)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs any command in a session of its own; ends it politely, then all that is left of it."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log is not None else subprocess.DEVNULL
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cwd, start_new_session=True
        )
        try:
            yield process
        finally:
            end_tree(process.pid)
            process.wait()


def end_tree(pid: int) -> None:
    """SIGTERM to the process, SIGKILL to whatever of its tree is left after ten seconds."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
        root.send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs(tree, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def rss_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def find_child(pid: int, mark: str, timeout_s: float = START_TIMEOUT_S) -> int:
    """The descendant of `pid` whose command line contains `mark`, once it exists."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if any(mark in part for part in child.cmdline()):
                        return child.pid
        if not psutil.pid_exists(pid):
            break
        time.sleep(0.02)
    raise RuntimeError(f"no process with {mark!r} appeared below {pid}")


def _read_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(START_TIMEOUT_S):
            raise RuntimeError(f"{process.args!r} did not start in time")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended without a word")
    return line
