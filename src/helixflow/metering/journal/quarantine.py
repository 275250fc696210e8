"""What of a journal could not be read, kept for people to look at."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import structlog

from helixflow.core.errors import ErrorKind, HelixError

log = structlog.get_logger("helixflow.metering")


class Quarantine:
    """Keeps stretches of one journal in files `<journal id>-<position>`; `positions` of them so far. Blocks."""

    def __init__(self, folder: Path, journal_id: str) -> None:
        # Where they begin.
        self.positions: list[int] = []
        self._folder = folder
        self._journal_id = journal_id

    def keep(self, position: int, blocks: Iterator[bytes], reason: str) -> None:
        """Writes a file, over an earlier one of the same stretch, counts and logs. No blocks: the bytes are missing.

        Raises `HelixError` STORAGE_FULL when the file cannot be written; nothing is counted then.
        """
        path = self._folder / f"{self._journal_id}-{position:020d}"
        hidden = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        size = 0
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as file:
                    for block in blocks:
                        size += file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
                hidden.rename(path)
            finally:
                hidden.unlink(missing_ok=True)
        except OSError as exc:
            message = f"A damaged part of a journal cannot be kept: {self._folder} cannot be written."
            raise HelixError(ErrorKind.STORAGE_FULL, message) from exc
        self.positions.append(position)
        log.error(
            "journal.quarantined",
            journal=self._journal_id,
            position=position,
            bytes=size,
            reason=reason,
            file=str(path),
        )
