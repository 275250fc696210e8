"""One child process: started in a session of its own, signalled, reaped without blocking."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Spawned:
    """A running (or just ended) child. `output_fd` reads its stdout and stderr, if captured, and never blocks."""

    popen: "subprocess.Popen[bytes]"
    output_fd: int | None = None

    @property
    def pid(self) -> int:
        return self.popen.pid

    def poll(self) -> int | None:
        """The exit status once it has ended (negative: the signal), reaping it; None while it runs."""
        return self.popen.poll()

    def terminate(self) -> None:
        """SIGTERM to the process alone: what it started is its own to end."""
        self._signal(signal.SIGTERM, group=False)

    def kill(self) -> None:
        """SIGKILL to its whole process group."""
        self._signal(signal.SIGKILL, group=True)

    def sweep(self) -> None:
        """After its end: kills what it left behind in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: int, *, group: bool) -> None:
        if self.popen.returncode is not None:
            return
        # It may end on its own at any time; macOS answers EPERM for a zombie's group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number) if group else os.kill(self.pid, number)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    pass_fds: Iterable[int] = (),
    stdin: bytes = b"",
    capture: bool = False,
) -> Spawned:
    """Starts `argv` in a session of its own, so that Ctrl-C at the terminal does not reach it.

    `stdin` is read by the child from an unlinked file, so nothing can block. Raises `OSError` when the program cannot
    be started.
    """
    output_read = output_write = None
    if capture:
        output_read, output_write = os.pipe()
        os.set_blocking(output_read, False)
    try:
        with contextlib.ExitStack() as stack:
            source: int = subprocess.DEVNULL
            if stdin:
                file = stack.enter_context(tempfile.TemporaryFile())
                file.write(stdin)
                file.seek(0)
                source = file.fileno()
            popen = subprocess.Popen(
                list(argv),
                env=None if env is None else dict(env),
                pass_fds=tuple(pass_fds),
                stdin=source,
                stdout=output_write,
                stderr=output_write,
                start_new_session=True,
            )
    except OSError:
        if output_read is not None:
            os.close(output_read)
        raise
    finally:
        if output_write is not None:
            os.close(output_write)
    return Spawned(popen, output_read)
