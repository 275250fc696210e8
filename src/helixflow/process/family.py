"""Runs a program that starts processes of its own, so that none of them outlives it, us or our parent.

    python -m helixflow.process.family -- program argument…

The death signal of `process.shim` reaches one process; a family needs somebody who stays. All of it is one process
group, made by whoever started us (`start_new_session`): when the parent goes, the group is killed, ourselves included;
when the program ends, we end as it did, and what it left in the group is swept by whoever started us.
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

from helixflow.process.death import disarm_death_signal

_LOOK_S: Final = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the program's status, 127 if it could not be started; ends by the signal that ended the program."""
    parser = argparse.ArgumentParser(prog="helixflow.process.family", description=__doc__)
    parser.add_argument("program", nargs="+")
    program = parser.parse_args(argv).program
    parent = os.getppid()
    # Until here the parent's end was ours; from here on we see to it ourselves.
    disarm_death_signal()
    try:
        child = subprocess.Popen(program, start_new_session=False)
    except OSError as exc:
        print(f" E cannot run {program[0]}: {exc.strerror}", file=sys.stderr, flush=True)  # noqa: T201
        return 127

    def pass_on(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.wait(_LOOK_S)
            break
        if os.getppid() != parent:
            _kill_group()
    if status < 0:
        _end_by(-status)
    return status


def _kill_group() -> None:
    """SIGKILL to everybody, ourselves too. Where the group is not ours alone, only to ourselves."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_by(number: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # SIGKILL and SIGSTOP have no other effect anyway
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def command(argv: Sequence[str]) -> list[str]:
    """`argv` as a family, to be started by the process with which it is to end."""
    return [sys.executable, "-P", "-m", "helixflow.process.family", "--", *argv]


if __name__ == "__main__":
    sys.exit(main())
