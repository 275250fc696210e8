"""What a database failure means to a person, and to a caller."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError, IntegrityError

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError

# By the first part of SQLite's error name: SQLITE_READONLY_DBMOVED is a kind of SQLITE_READONLY.
_REASONS = {
    "FULL": "the disk is full; make room and try again",
    "READONLY": "it is read-only; check the permissions of the file, its folder and the file system",
    "BUSY": "another process holds it locked; stop that process and try again",
    "LOCKED": "another process holds it locked; stop that process and try again",
    "CORRUPT": "it is damaged; restore it from a backup, or move it away to start with an empty one",
    "NOTADB": "it is not a SQLite database; restore it from a backup, or move it away to start with an empty one",
    "CANTOPEN": "it cannot be opened; check the permissions of the file and its folder",
    "IOERR": "reading or writing it failed; check the disk",
    "PERM": "access was denied; check the permissions of the file and its folder",
}


def reason_of(exc: BaseException) -> str | None:
    """Why the database failed, with what to do; None when the failure is our own mistake (bad SQL, a broken rule)."""
    error: BaseException | None = exc.orig if isinstance(exc, DBAPIError) else exc
    if not isinstance(error, sqlite3.Error) or isinstance(exc, IntegrityError):
        return None
    name = getattr(error, "sqlite_errorname", None) or ""
    return _REASONS.get(name.removeprefix("SQLITE_").split("_")[0])


@contextmanager
def failures_for_people(path: Path) -> Iterator[None]:
    """Turns failures of the database at `path` into a `UserError` (STORAGE) of one line. For the start."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as exc:
        if (reason := reason_of(exc)) is None:
            raise
        raise UserError(f"{path}: {reason}", ExitCode.STORAGE) from exc
    except OSError as exc:
        raise UserError(f"{path}: {exc.strerror or exc}", ExitCode.STORAGE) from exc


@contextmanager
def failures_for_callers() -> Iterator[None]:
    """Turns failures of the database into a `HelixError`: STORAGE_FULL, else UNAVAILABLE. For requests."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as exc:
        if (reason := reason_of(exc)) is None:
            raise
        if reason == _REASONS["FULL"]:
            raise HelixError(ErrorKind.STORAGE_FULL, "The disk of the database is full.") from exc
        raise HelixError(ErrorKind.UNAVAILABLE, "The database cannot be used now. Try again.") from exc
