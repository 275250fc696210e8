"""Folders of journals, and who owns one: whoever holds the lock in it."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helixflow.core.errors import ExitCode, UserError
from helixflow.metering.journal.files import sync_folder

LOCK_NAME: Final = "lock"
_JOURNAL_ID: Final = re.compile(r"[0-9a-f]{24}")
_BIRTH_LOCK: Final = ".birth"
_BIRTH_TIMEOUT_S: Final = 15.0
_BIRTH_POLL_S: Final = 0.02
# Folders that are no journal yet, and no longer.
_NEW: Final = ".new-"
_GONE: Final = ".gone-"


@dataclass(frozen=True, slots=True)
class Ownership:
    """A journal whose writer is gone, and which nobody else can take before `release` or `remove`, one of them once."""

    folder: Path
    _fd: int

    def remove(self) -> None:
        """Deletes the journal; blocks. Raises `OSError`; what is then left is no journal any more."""
        try:
            gone = self.folder.with_name(f"{_GONE}{self.folder.name}")
            self.folder.rename(gone)
            shutil.rmtree(gone)
        finally:
            os.close(self._fd)

    def release(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Newborn:
    """A journal in the making: `hidden` becomes `folder`. `lock` is the descriptor that holds it."""

    journal_id: str
    hidden: Path
    folder: Path
    lock: int


@contextlib.contextmanager
def bear(root: Path) -> Iterator[Newborn]:
    """Makes a journal; it is locked before others can see it, which they can after the block. Blocks.

    Makes `root` too, and removes what others left that were killed in here. Raises `OSError`, `UserError` (STORAGE).
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _birth_lock(root):
        for leftover in (*root.glob(f"{_NEW}*"), *root.glob(f"{_GONE}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        journal_id = secrets.token_hex(12)
        hidden = root / f"{_NEW}{journal_id}"
        hidden.mkdir(mode=0o700)
        lock = None
        try:
            lock = os.open(hidden / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            newborn = Newborn(journal_id, hidden, root / journal_id, lock)
            yield newborn
            hidden.rename(newborn.folder)
        except BaseException:
            if lock is not None:
                os.close(lock)
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        sync_folder(root)


def list_journals(root: Path) -> list[Path]:
    """The journals there are, of the living and the dead, by name; [] when there is no `root`. Blocks."""
    try:
        return sorted(path for path in root.iterdir() if _JOURNAL_ID.fullmatch(path.name))
    except FileNotFoundError:
        return []


def take_over(folder: Path) -> Ownership | None:
    """The journal, if nobody holds it: its writer is gone. None: somebody does, or it is no more. Blocks for no time.

    Raises `OSError`. The kernel frees the lock whichever way its holder ends.
    """
    path = folder / LOCK_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been removed between the two.
        if os.path.samestat(os.fstat(fd), path.stat()):
            return Ownership(folder, fd)
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


@contextlib.contextmanager
def _birth_lock(root: Path) -> Iterator[None]:
    fd = os.open(root / _BIRTH_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _BIRTH_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{root}: another process is making a journal; try again", ExitCode.STORAGE
                    ) from exc
                time.sleep(_BIRTH_POLL_S)
        yield
    finally:
        os.close(fd)
