"""Runs a program that knows nothing of us so that it dies with its parent.

    python -m helixflow.process.shim --parent PID -- program argument…

Linux: asks for the death signal, checks that the parent is still there, then becomes the program. Elsewhere (or with
`--watch`) it stays as the watching parent: SIGTERM and SIGINT are passed on, and the program is killed when the parent
goes. The caller makes the session (`start_new_session`), so one `killpg` reaches both.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final

from helixflow.process.death import arm_death_signal, disarm_death_signal, end_now, has_death_signal

_CHECK_INTERVAL_S: Final = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Returns only if the program could not be started (127) or after watching it to its end (its status)."""
    parser = argparse.ArgumentParser(prog="helixflow.process.shim", description=__doc__)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--watch", action="store_true", help="stay as the watching parent")
    parser.add_argument("program", nargs="+")
    given = parser.parse_args(argv)
    arm_death_signal(given.parent)
    try:
        if given.watch or not has_death_signal():
            # The watcher must outlive its parent for long enough to kill the program.
            disarm_death_signal()
            return _watch(given.program, given.parent)
        os.execvp(given.program[0], given.program)  # noqa: S606  (no shell is the point)
    except OSError as exc:
        print(f" E cannot run {given.program[0]}: {exc.strerror}", file=sys.stderr, flush=True)  # noqa: T201
    return 127


def _watch(program: list[str], parent: int) -> int:
    child = subprocess.Popen(program, start_new_session=False)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.wait(_CHECK_INTERVAL_S)
            return status if status >= 0 else 128 - status
        if os.getppid() != parent:
            child.kill()
            child.wait()
            end_now()


def command(argv: Sequence[str], *, parent: int, watch: bool = False) -> list[str]:
    """`argv` behind the shim, to be started by the process `parent`."""
    flags = ["--watch"] if watch else []
    return [sys.executable, "-P", "-m", "helixflow.process.shim", "--parent", str(parent), *flags, "--", *argv]


if __name__ == "__main__":
    sys.exit(main())
