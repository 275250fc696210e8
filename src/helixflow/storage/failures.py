"""What a database failure means to a person, and to a caller. Never a password, a statement or a value of one."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a database failed, with what to do. `passing`: it may work a moment later without anybody doing anything."""

    text: str
    passing: bool = False
    full: bool = False


class Unreachable(Exception):
    """No connection could be made; nothing was sent."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text)
        self.reason = reason


_LOCKED: Final = Reason("another process holds it locked; stop that process and try again", passing=True)
_FULL: Final = Reason("the disk is full; make room and try again", full=True)
_SLOW: Final = Reason("it did not answer in time; look at its load", passing=True)
LOST: Final = Reason("the connection was lost; is PostgreSQL running?", passing=True)

# By the first part of SQLite's error name: SQLITE_READONLY_DBMOVED is a kind of SQLITE_READONLY.
_SQLITE: Final = {
    "FULL": _FULL,
    "READONLY": Reason("it is read-only; check the permissions of the file, its folder and the file system"),
    "BUSY": _LOCKED,
    "LOCKED": _LOCKED,
    "CORRUPT": Reason("it is damaged; restore it from a backup, or move it away to start with an empty one"),
    "NOTADB": Reason(
        "it is not a SQLite database; restore it from a backup, or move it away to start with an empty one"
    ),
    "CANTOPEN": Reason("it cannot be opened; check the permissions of the file and its folder"),
    "IOERR": Reason("reading or writing it failed; check the disk"),
    "PERM": Reason("access was denied; check the permissions of the file and its folder"),
}

# By SQLSTATE, or its class (two characters): appendix A of PostgreSQL's manual.
_POSTGRESQL: Final = {
    "08": LOST,
    "28P01": Reason("the password was refused; check database.password_file or database.password_env"),
    "28": Reason("the user was refused; check the user in database.url, and pg_hba.conf on the server"),
    "3D000": Reason("there is no such database; make it with createdb, or correct database.url"),
    "25006": Reason("it is read-only, perhaps a standby; connect to the primary", passing=True),
    "25P03": Reason("a transaction did nothing for too long and was ended", passing=True),
    "40": Reason("another transaction was in the way", passing=True),
    "42501": Reason("the user may not do that there; make it the owner of the database"),
    "53100": _FULL,
    "53300": Reason(
        "it has too many connections; raise its max_connections, or lower database.pool_size", passing=True
    ),
    "53": Reason("it is short of memory or another resource", passing=True),
    "55P03": _LOCKED,
    "57014": _SLOW,
    "57P03": Reason("it is starting up, shutting down or recovering", passing=True),
    "57P04": Reason("it was dropped; restore it from a backup"),
    "57": Reason("it was shut down or ended the connection", passing=True),
    "58": Reason("reading or writing it failed; check the disk of the server"),
    "XX001": Reason("it is damaged; restore it from a backup"),
    "XX002": Reason("an index is damaged; REINDEX the database"),
}


def reason_of(exc: BaseException) -> Reason | None:
    """Why the database failed; None when the failure is our own mistake (bad SQL, a broken rule)."""
    if isinstance(exc, Unreachable):
        return exc.reason
    if isinstance(exc, PoolTimeoutError | TimeoutError):
        return _SLOW
    if isinstance(exc, IntegrityError):
        return None
    error: BaseException | None = exc.orig if isinstance(exc, DBAPIError) else exc
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", None) or ""
        return _SQLITE.get(name.removeprefix("SQLITE_").split("_")[0])
    # Of asyncpg's own exceptions and of those that SQLAlchemy makes of them; neither is imported for it.
    state = getattr(error, "sqlstate", None) or ""
    if (reason := _POSTGRESQL.get(state) or _POSTGRESQL.get(state[:2])) is not None:
        return reason
    return LOST if isinstance(exc, DBAPIError) and exc.connection_invalidated else None


@contextmanager
def failures_for_people(name: str) -> Iterator[None]:
    """Turns failures of the database of that name into a `UserError` (STORAGE) of one line. For the start."""
    try:
        yield
    except (DBAPIError, sqlite3.Error, PoolTimeoutError, TimeoutError, Unreachable) as exc:
        if (reason := reason_of(exc)) is None:
            raise
        raise UserError(f"{name}: {reason.text}", ExitCode.STORAGE) from exc
    except OSError as exc:
        raise UserError(f"{name}: {exc.strerror or exc}", ExitCode.STORAGE) from exc


@contextmanager
def failures_for_callers() -> Iterator[None]:
    """Turns failures of the database into a `HelixError`: STORAGE_FULL, else UNAVAILABLE. For requests."""
    try:
        yield
    except (DBAPIError, sqlite3.Error, PoolTimeoutError, TimeoutError, Unreachable) as exc:
        if (reason := reason_of(exc)) is None:
            raise
        if reason.full:
            raise HelixError(ErrorKind.STORAGE_FULL, "The disk of the database is full.") from exc
        raise HelixError(ErrorKind.UNAVAILABLE, "The database cannot be used now. Try again.") from exc
