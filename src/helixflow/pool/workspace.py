"""Temporary folders that outlive no owner: each carries a lock, and a folder whose lock is free belongs to nobody."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helixflow.pool.disk import locked, try_lock

_LOCK_NAME: Final = ".lock"


@dataclass(frozen=True, slots=True)
class Workspace:
    """An empty folder of one pull. A child process that inherits `lock_fd` keeps the folder alive until it ends too."""

    path: Path
    lock_fd: int


@contextlib.contextmanager
def open_workspace(parent: Path, guard: Path) -> Iterator[Workspace]:
    """A fresh folder under `parent`, removed at the end; what dead owners left is removed first.

    `guard` is a lock file that makes "create and lock" one step, so that no sweep sees a folder before its lock.
    """
    with locked(guard):
        sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix="pull-", dir=parent))
        lock_fd = try_lock(folder / _LOCK_NAME)
    if lock_fd is None:
        raise AssertionError("a fresh folder is locked by another")
    try:
        inner = folder / "work"
        inner.mkdir()
        yield Workspace(inner, lock_fd)
    finally:
        # A file that cannot be removed now is removed by the next sweep.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock_fd)


def sweep(parent: Path) -> None:
    """Removes the folders under `parent` whose owners are dead, and all plain files. Hold the guard.

    Plain files are written under the guard only, so one that is found was left by a process that was killed.
    """
    for entry in parent.iterdir():
        if not entry.is_dir():
            entry.unlink(missing_ok=True)
            continue
        # Its owner may be removing it right now.
        with contextlib.suppress(FileNotFoundError):
            lock_fd = try_lock(entry / _LOCK_NAME)
            if lock_fd is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(lock_fd)
