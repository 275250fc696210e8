"""The life pipe, which does the kernel's work where there is no death signal."""

import os
import signal
import subprocess
import sys

import pytest

from tests.integration.launch.conftest import WAIT_S

# As on macOS.
CHILD = """
import sys, time
from helixflow.process import death
death.has_death_signal = lambda: False
death.watch_life(int(sys.argv[1]))
print("alive", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def pipe() -> "tuple[int, int]":
    return os.pipe()


def start(life_fd: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", CHILD, str(life_fd)], pass_fds=(life_fd,), stdout=subprocess.PIPE)


def test_the_end_of_the_pipe_is_the_end_of_the_child(pipe: tuple[int, int], mark: str) -> None:
    read, write = pipe
    with start(read) as child:
        os.close(read)
        assert child.stdout is not None
        assert child.stdout.readline() == b"alive\n"
        os.close(write)
        assert child.wait(WAIT_S) == -signal.SIGKILL


def test_a_launcher_that_was_gone_before_is_noticed(pipe: tuple[int, int], mark: str) -> None:
    read, write = pipe
    os.close(write)
    with start(read) as child:
        os.close(read)
        assert child.wait(WAIT_S) == -signal.SIGKILL
        assert child.stdout is not None
        assert child.stdout.read() == b""
