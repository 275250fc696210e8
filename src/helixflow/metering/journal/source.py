"""One segment as a reader sees it: bytes by position, whatever state the file is in."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.metering.journal.files import Files
from helixflow.metering.journal.frames import (
    FORMAT_VERSION,
    MAGIC,
    OVERHEAD,
    SEGMENT_HEADER_BYTES,
    decode_segment_header,
    frame_end,
)
from helixflow.metering.journal.records import MAX_RECORD_BYTES

BLOCK_BYTES: Final = 1 << 20
_PAGE_BYTES: Final = 4096
_ZEROS: Final = bytes(BLOCK_BYTES)


class Source:
    """A segment, to be read. Nothing stays open, so that others may delete it. All blocks.

    Raises `HelixError` UNAVAILABLE when the disk cannot be read at all. Parts that it cannot read are zeros.
    """

    def __init__(self, files: Files, start: int, path: Path, following: int | None = None) -> None:
        """`following` is where the next segment starts. Raises `UserError` (STORAGE) for one of a newer format."""
        self.start = start
        self.path = path
        self._files = files
        header = decode_segment_header(self.read(start, SEGMENT_HEADER_BYTES))
        if header is not None and header.version > FORMAT_VERSION:
            raise newer_format(path.parent)
        self.sound = header is not None and header.start == start
        self.first = start + SEGMENT_HEADER_BYTES
        if header is not None and self.sound:
            self.end = start + header.size
        else:
            self.end = max(self.first, following if following is not None else start + self._size())

    def read(self, position: int, size: int) -> bytes:
        """Fewer than `size` bytes only at the end of the file; none when it is gone."""
        offset = position - self.start
        try:
            fd = self._files.open(self.path)
        except FileNotFoundError:
            return b""
        except OSError as exc:
            raise _unreadable(self.path) from exc
        try:
            return self._files.read(fd, size, offset)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise _unreadable(self.path) from exc
            return self._read_pages(fd, offset, offset + size)
        finally:
            self._files.close(fd)

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, as far as the file goes."""
        while start < end and (block := self.read(start, min(end - start, BLOCK_BYTES))):
            yield block
            start += len(block)

    def find_frame(self, position: int) -> int | None:
        """Where the first sound frame begins at or after `position`."""
        while position < self.end:
            block = self.read(position, BLOCK_BYTES)
            offset = block.find(MAGIC)
            while offset >= 0:
                if frame_end(block, offset, position + offset) is not None:
                    return position + offset
                offset = block.find(MAGIC, offset + 1)
            if len(block) < BLOCK_BYTES:
                break
            # A frame may begin in this block and end in the next.
            position += len(block) - MAX_RECORD_BYTES
        return None

    def find_used(self, position: int) -> int:
        """The end of what is not zero from `position` on; `position` when all is zero or missing."""
        used = position
        for block in self.blocks(position, self.end):
            if block != _ZEROS[: len(block)]:
                used = position + len(block.rstrip(b"\0"))
            position += len(block)
        return used

    @property
    def begun(self) -> bool:
        """Whether a record was written to it, or anything else."""
        return any(self.read(self.first, OVERHEAD))

    @property
    def whole(self) -> bool:
        """Whether the file is as long as it should be."""
        return self._size() >= self.end - self.start

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def _read_pages(self, fd: int, offset: int, end: int) -> bytes:
        data = b""
        while offset < end:
            size = min(end - offset, _PAGE_BYTES - offset % _PAGE_BYTES)
            try:
                page = self._files.read(fd, size, offset)
            except OSError:
                page = bytes(size)
            data += page
            offset += size
        return data


def newer_format(folder: Path) -> UserError:
    message = f"{folder}: written by a newer version of HelixFlow; start that one to ship it (nothing was deleted)"
    return UserError(message, ExitCode.STORAGE)


def _unreadable(path: Path) -> HelixError:
    return HelixError(ErrorKind.UNAVAILABLE, f"{path} cannot be read.")
