"""A person at a terminal: a command with a pseudo-terminal of its own, and somebody who reads and types."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

WAIT_S = 60.0
_SPAWN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


class Conversation:
    """What the command shows, on standard output and error alike, is in `shown`."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._from = 0
        self.shown = ""

    def answer(self, question: str, answer: str) -> None:
        """Waits for `question`, after the one before, and types the answer. Give its last space too: only then is
        a password waited for.
        """
        deadline = time.monotonic() + WAIT_S
        while (at := self.shown.find(question, self._from)) < 0:
            assert self._read(deadline), f"ended without {question!r}: {self.shown}"
        self._from = at + len(question)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{answer}\n".encode())
        self._process.stdin.flush()

    def finish(self) -> int:
        """Waits for the end; the exit status."""
        deadline = time.monotonic() + WAIT_S
        while self._read(deadline):
            pass
        return self._process.wait(WAIT_S)

    def _read(self, deadline: float) -> bool:
        """Takes in what comes next; False at the end."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"waited in vain: {self.shown}"
        data = os.read(self._process.stdout.fileno(), 65_536)
        self.shown += data.decode().replace("\r\n", "\n")
        return bool(data)


@contextmanager
def converse(*command: str | Path, environment: Mapping[str, str]) -> Iterator[Conversation]:
    """Runs `command` on a terminal until the end of the block, where it must have ended."""
    words = [sys.executable, "-c", _SPAWN, *map(str, command)]
    with subprocess.Popen(
        words, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            yield Conversation(process)
            assert process.poll() is not None, "it still runs"
        finally:
            process.kill()
