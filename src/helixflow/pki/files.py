"""Files that hold keys: written whole or not at all, read by their owner only."""

import contextlib
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from helixflow.core.errors import ExitCode, UserError

_LOCK_TIMEOUT_S: Final = 15.0
_LOCK_POLL_S: Final = 0.02
# No key or chain of certificates comes near it.
_MAX_BYTES: Final = 1 << 20
_TEMPORARY: Final = ".new-"

# Tells one state of a file from another: inode, size, time of change.
Version = tuple[int, int, int]


class PkiFolder:
    """What lies where under `data_dir/pki`. Keys are 0600, folders 0700, what everybody may know 0644."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The trust bundle: roots only.
        self.ca_certificate = path / "ca.crt"
        # The private key that signs, followed by its certificate and the intermediates above it.
        self.ca_key = path / "ca.key"
        self.services = path / "services"
        self.issued = path / "issued.jsonl"
        self.revoked = path / "revoked.jsonl"
        self.retired = path / "retired.jsonl"
        self._lock = path / "lock"

    def service_file(self, service: str) -> Path:
        """Private key, certificate and intermediates of `service`, in one file so that they always belong together."""
        return self.services / f"{service}.pem"

    def prepare(self) -> None:
        """Creates the folders. Raises `UserError`: CONFIG when others can write there, STORAGE when it cannot be."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            self.services.mkdir(mode=0o700, exist_ok=True)
            for folder in (self.path, self.services):
                found = folder.stat()
                if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise UserError(f"{folder}: others can write there; run chmod 700 {folder}", ExitCode.CONFIG)
                if found.st_uid not in (os.geteuid(), 0):
                    raise UserError(f"{folder}: belongs to another user", ExitCode.CONFIG)
        except OSError as exc:
            raise UserError(f"{self.path}: cannot be prepared: {exc.strerror}", ExitCode.STORAGE) from exc

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from issuing at the same time. Blocks; call it from a thread.

        Raises `UserError` (STORAGE) when the lock cannot be had in time.
        """
        try:
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as exc:
            message = f"{self.path}: there is no certificate authority yet; run: helixflow pki init"
            raise UserError(message, ExitCode.CONFIG) from exc
        except OSError as exc:
            raise UserError(f"{self._lock}: cannot be opened: {exc.strerror}", ExitCode.STORAGE) from exc
        try:
            deadline = time.monotonic() + _LOCK_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as exc:
                    if time.monotonic() > deadline:
                        raise UserError(f"{self._lock}: another process holds it; try again", ExitCode.STORAGE) from exc
                    time.sleep(_LOCK_POLL_S)
            self._remove_leftovers()
            yield
        finally:
            os.close(fd)

    def _remove_leftovers(self) -> None:
        """What a writer that was killed left behind; only the holder of the lock writes."""
        for folder in (self.path, self.services):
            for path in folder.glob(f"{_TEMPORARY}*"):
                path.unlink(missing_ok=True)


def read_secret(path: Path, *, group_may_read: bool = False) -> bytes:
    """The content of a file with a private key.

    Raises `FileNotFoundError`, or `UserError`: CONFIG when others have access to it, STORAGE when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & (0o037 if group_may_read else 0o077):
                raise UserError(f"{path}: other users have access to this key; run chmod 600 {path}", ExitCode.CONFIG)
            return file.read(_MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise UserError(f"{path}: cannot be read: {exc.strerror}", ExitCode.STORAGE) from exc


def read_public(path: Path) -> bytes:
    """Raises `FileNotFoundError`, or `UserError` (STORAGE) when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise UserError(f"{path}: cannot be read: {exc.strerror}", ExitCode.STORAGE) from exc


def write_atomically(path: Path, content: bytes, mode: int) -> None:
    """Replaces `path` by a whole new file that has `mode` from its first byte on. Raises `UserError` (STORAGE)."""
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as exc:
        raise UserError(f"{path}: cannot be written: {exc.strerror}", ExitCode.STORAGE) from exc


def version_of(path: Path) -> Version | None:
    """None when there is no such file, or none that we may look at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
