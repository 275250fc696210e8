"""Segments: the files of a journal, each named by the position at which it starts."""

import contextlib
import errno
import re
from pathlib import Path
from typing import Final

from helixflow.metering.journal.files import Files
from helixflow.metering.journal.frames import OVERHEAD, SEGMENT_HEADER_BYTES, encode_segment_header

_NAME_DIGITS: Final = 20
_NAME: Final = re.compile(r"[0-9]{20}")
_HIDDEN: Final = ".new-"


class Segment:
    """One file, open for writing. `end` is the position at which the next segment starts."""

    def __init__(self, files: Files, fd: int, start: int, size: int) -> None:
        self._files = files
        self.fd = fd
        self.start = start
        self.end = start + size
        # There is always room left for the mark that ends it.
        self.limit = self.end - OVERHEAD

    @classmethod
    def create(cls, files: Files, folder: Path, start: int, size: int) -> "Segment":
        """Takes the room from the disk, writes the header, and only then gives the file its name; blocks.

        Raises `OSError`, and leaves nothing then.
        """
        hidden = folder / f"{_HIDDEN}{start:0{_NAME_DIGITS}d}"
        hidden.unlink(missing_ok=True)
        fd = files.create(hidden)
        try:
            files.allocate(fd, size)
            segment = cls(files, fd, start, size)
            segment.write(encode_segment_header(start, size), start)
            files.sync(fd)
            files.rename(hidden, folder / f"{start:0{_NAME_DIGITS}d}")
        except OSError:
            files.close(fd)
            with contextlib.suppress(OSError):  # the first failure is what matters
                hidden.unlink(missing_ok=True)
            raise
        return segment

    @property
    def first(self) -> int:
        """The position of its first record."""
        return self.start + SEGMENT_HEADER_BYTES

    def write(self, data: bytes, position: int) -> None:
        """All of `data`, or an `OSError` after which some of it may be there."""
        offset = position - self.start
        written = self._files.write(self.fd, data, offset)
        while written < len(data):  # what is left gives the reason, unless it succeeds
            more = self._files.write(self.fd, data[written:], offset + written)
            if more == 0:
                raise OSError(errno.ENOSPC, "nothing was written")
            written += more

    def read(self, position: int, size: int) -> bytes:
        return self._files.read(self.fd, size, position - self.start)

    def sync(self) -> None:
        """What was written is on the disk; blocks."""
        self._files.sync(self.fd)

    def close(self) -> None:
        self._files.close(self.fd)


def capacity(segment_bytes: int) -> int:
    """What records may take of a segment."""
    return segment_bytes - SEGMENT_HEADER_BYTES - OVERHEAD


def list_segments(folder: Path) -> list[tuple[int, Path]]:
    """(start position, path) in order; [] when there is no such folder."""
    try:
        names = (path.name for path in folder.iterdir())
        return sorted((int(name), folder / name) for name in names if _NAME.fullmatch(name))
    except FileNotFoundError:
        return []
