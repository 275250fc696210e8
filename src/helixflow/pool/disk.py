"""Writing large files so that a crash leaves nothing half-written and a full disk is one clear line."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from helixflow.core.errors import ExitCode, UserError

CHUNK_BYTES: Final = 1 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises `UserError` (STORAGE) with both numbers unless `needed_bytes` are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"not enough disk space in {folder}: {format_bytes(needed_bytes)} needed, {format_bytes(free)} free",
            ExitCode.STORAGE,
        )


@contextlib.contextmanager
def full_disk_is_clear(folder: Path, needed_bytes: Callable[[], int]) -> Iterator[None]:
    """Turns "no space left" and "quota exceeded" within the block into a `UserError` (STORAGE) with both numbers."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _FULL:
            raise
        needed = needed_bytes()
        wanted = f"{format_bytes(needed)} needed" if needed else "the size of the model is not known"
        free = format_bytes(shutil.disk_usage(folder).free)
        raise UserError(f"the disk of {folder} is full: {wanted}, {free} free", ExitCode.STORAGE) from exc


def copy_hashed(
    reader: IO[bytes], target: Path, report: Callable[[int], None], *, limit_bytes: int | None = None
) -> str:
    """Copies `reader` into `target`, synced to disk; returns the SHA-256 (hex). `report` gets the bytes so far.

    Raises `OSError` as it comes; more than `limit_bytes` is a `ValueError`.
    """
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as file:
        while chunk := reader.read(CHUNK_BYTES):
            done += len(chunk)
            if limit_bytes is not None and done > limit_bytes:
                raise ValueError(f"more than the announced {limit_bytes} bytes")
            file.write(chunk)
            digest.update(chunk)
            report(done)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def hash_file(path: Path, report: Callable[[int], None]) -> str:
    """The SHA-256 (hex) of a file; `report` gets the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            done += len(chunk)
            digest.update(chunk)
            report(done)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes, *, temporary_folder: Path) -> None:
    """Replaces `path`: after a crash it holds the old content or the new, never a part.

    `temporary_folder` is on the same disk; somebody sweeps it.
    """
    temporary = temporary_folder / f"{path.name}.{os.urandom(8).hex()}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_path(path: Path) -> None:
    """Makes a file's content survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames within `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """An open descriptor that holds `path` (made if missing) exclusively, or None when another holds it.

    The kernel frees the lock when the last copy of the descriptor is closed, however its owner ends. Between threads it
    works as between processes.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path` exclusively; waits for it. Only for what takes milliseconds."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def format_bytes(count: int) -> str:
    """`count` for people: 98.4 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
