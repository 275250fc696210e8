"""The lock on a data directory: whoever serves from it holds it for as long as the process lives."""

import fcntl
import os
from pathlib import Path
from typing import Final

from helixflow.core.errors import ExitCode, UserError

LOCK_NAME: Final = "serve.lock"


def lock_data_dir(run_dir: Path) -> int:
    """Takes the data directory that `run_dir` is part of; the lock lasts as long as the descriptor that is returned.

    Raises `UserError`: UNAVAILABLE when another process has it, STORAGE when the lock's file cannot be opened.
    """
    path = run_dir / LOCK_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise UserError(f"{path}: cannot be opened: {exc.strerror}", ExitCode.STORAGE) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        who = f" (process {holder})" if holder else ""
        raise UserError(
            f"helixflow{who} serves already from data_dir {run_dir.parent}; stop it or choose another one",
            ExitCode.UNAVAILABLE,
        ) from exc
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
