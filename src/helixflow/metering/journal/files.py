"""The few things that the journal asks of the operating system, so that tests can have each of them fail."""

import errno
import os
from pathlib import Path
from typing import Final, Protocol

_ZEROS: Final = bytes(1 << 20)
# What a file system answers that cannot allocate beforehand.
_NOT_SUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Files(Protocol):
    """Blocking; everything raises `OSError`. Descriptors are given to no child process."""

    def create(self, path: Path) -> int:
        """A new file, for its owner only."""
        ...

    def allocate(self, fd: int, size: int) -> None:
        """The file has `size` bytes, all zero, and the disk has room for them."""
        ...

    def write(self, fd: int, data: bytes, offset: int) -> int:
        """As `pwrite`: how many bytes were written, which may be fewer than were given."""
        ...

    def open(self, path: Path) -> int:
        """To read."""
        ...

    def read(self, fd: int, size: int, offset: int) -> bytes:
        """As `pread`, but fewer than `size` bytes only at the end of the file."""
        ...

    def sync(self, fd: int) -> None:
        """What was written is on the disk."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Within one folder; it survives a power cut."""
        ...

    def close(self, fd: int) -> None: ...


class SystemFiles:
    """The files of this machine."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def allocate(self, fd: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as exc:
                if exc.errno not in _NOT_SUPPORTED:
                    raise
            else:
                return
        offset = 0
        while offset < size:
            offset += os.pwrite(fd, _ZEROS[: size - offset], offset)

    def write(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        data = os.pread(fd, size, offset)
        while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
            data += more
        return data

    def sync(self, fd: int) -> None:
        if hasattr(os, "fdatasync"):
            os.fdatasync(fd)
        else:
            os.fsync(fd)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)
        sync_folder(new.parent)

    def close(self, fd: int) -> None:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Makes what was made and renamed within `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
