"""Dying with one's parent, so that no engine or gateway is ever left behind, whatever kills the launcher.

Linux: the kernel sends SIGKILL when the thread that spawned us ends (`prctl(2)`, PR_SET_PDEATHSIG); the launcher has
one thread, so that is the launcher. The setting survives `execve`. Elsewhere, and as a second line everywhere, each
child holds the read end of a pipe whose only write end is the launcher's: end of file means that it is gone.
"""

import ctypes
import os
import select
import signal
import sys
import threading
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def has_death_signal() -> bool:
    """Whether the kernel can end us with our parent."""
    return sys.platform == "linux"


def arm_death_signal(parent: int | None = None) -> None:
    """Asks the kernel for SIGKILL when the parent ends. Exits the process at once if `parent` is already gone.

    Call from the entry point before anything slow: a model that loads holds the GIL, but not the kernel. Raises
    `OSError` when the kernel refuses.
    """
    _set_death_signal(signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        end_now()


def disarm_death_signal() -> None:
    """For one who has something to do after its parent's end."""
    _set_death_signal(0)


def watch_life(life_fd: int) -> None:
    """Ends this process when the launcher's end of the life pipe closes; checks once at once.

    Where the kernel does it for us the one check is enough: it covers a parent that died before we asked.
    """
    if _is_closed(life_fd, timeout_ms=0):
        end_now()
    if not has_death_signal():
        threading.Thread(target=_wait_for_end, args=(life_fd,), name="life", daemon=True).start()


def end_now() -> None:
    """SIGKILL to ourselves: nobody is left who could use a graceful end."""
    os.kill(os.getpid(), signal.SIGKILL)


def _set_death_signal(number: int) -> None:
    if not has_death_signal():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")


def _wait_for_end(life_fd: int) -> None:
    while not _is_closed(life_fd, timeout_ms=None):
        pass
    end_now()


def _is_closed(life_fd: int, *, timeout_ms: int | None) -> bool:
    """Nothing is ever written to the pipe, so anything that `poll` reports is its end."""
    poll = select.poll()
    poll.register(life_fd, select.POLLIN)
    return bool(poll.poll(timeout_ms))
