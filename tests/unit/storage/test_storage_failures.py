"""What failures of a database mean to a caller and to a person."""

import sqlite3

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.storage.failures import failures_for_callers, failures_for_people


def wrapped(error: Exception) -> DBAPIError:
    return OperationalError("SELECT secret FROM accounts", {"password": "hunter2"}, error)


def sqlite_failure(name: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("at /var/lib/x.db")
    error.sqlite_errorname = name
    return error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (sqlite_failure("SQLITE_FULL"), ErrorKind.STORAGE_FULL, "disk is full"),
        (sqlite_failure("SQLITE_READONLY_DBMOVED"), ErrorKind.UNAVAILABLE, "read-only"),
        (sqlite_failure("SQLITE_BUSY"), ErrorKind.UNAVAILABLE, "locked"),
        (asyncpg.DiskFullError("x"), ErrorKind.STORAGE_FULL, "disk is full"),
        (asyncpg.LockNotAvailableError("x"), ErrorKind.UNAVAILABLE, "locked"),
        (asyncpg.QueryCanceledError("x"), ErrorKind.UNAVAILABLE, "in time"),
        (asyncpg.AdminShutdownError("x"), ErrorKind.UNAVAILABLE, "shut down"),
        (asyncpg.CrashShutdownError("x"), ErrorKind.UNAVAILABLE, "shut down"),
        (asyncpg.CannotConnectNowError("x"), ErrorKind.UNAVAILABLE, "starting up"),
        (asyncpg.ReadOnlySQLTransactionError("x"), ErrorKind.UNAVAILABLE, "standby"),
        (asyncpg.IdleInTransactionSessionTimeoutError("x"), ErrorKind.UNAVAILABLE, "too long"),
        (asyncpg.DeadlockDetectedError("x"), ErrorKind.UNAVAILABLE, "in the way"),
        (asyncpg.OutOfMemoryError("x"), ErrorKind.UNAVAILABLE, "short of memory"),
        (asyncpg.InsufficientPrivilegeError("x"), ErrorKind.UNAVAILABLE, "owner of the database"),
        (asyncpg.PostgresIOError("x"), ErrorKind.UNAVAILABLE, "disk of the server"),
        (asyncpg.DataCorruptedError("x"), ErrorKind.UNAVAILABLE, "damaged"),
        (asyncpg.ConnectionDoesNotExistError("x"), ErrorKind.UNAVAILABLE, "connection was lost"),
    ],
)
def test_each_failure_has_a_kind_and_a_line(error: Exception, kind: ErrorKind, words: str) -> None:
    with pytest.raises(HelixError) as to_caller, failures_for_callers():
        raise wrapped(error)
    assert to_caller.value.kind is kind
    assert isinstance(to_caller.value.__cause__, DBAPIError)
    with pytest.raises(UserError, match=words) as to_person, failures_for_people("the-name"):
        raise wrapped(error)
    assert to_person.value.exit_code is ExitCode.STORAGE
    assert to_person.value.message.startswith("the-name: ")
    for message in (to_caller.value.message, to_person.value.message):
        assert not {"hunter2", "SELECT", "/var/lib"} & set(message.replace(":", " ").split())


@pytest.mark.parametrize("error", [TimeoutError(), PoolTimeoutError()])
def test_waiting_too_long_is_unavailable(error: Exception) -> None:
    with pytest.raises(HelixError) as caught, failures_for_callers():
        raise error
    assert caught.value.kind is ErrorKind.UNAVAILABLE


@pytest.mark.parametrize(
    "error",
    [
        wrapped(asyncpg.UndefinedColumnError("x")),
        wrapped(asyncpg.PostgresSyntaxError("x")),
        wrapped(sqlite_failure("SQLITE_ERROR")),
        IntegrityError("INSERT", {}, asyncpg.UniqueViolationError("x")),
        IntegrityError("INSERT", {}, sqlite3.IntegrityError("x")),
        ZeroDivisionError(),
    ],
)
def test_our_own_mistakes_and_broken_rules_come_out_as_they_are(error: Exception) -> None:
    for guard in (failures_for_callers(), failures_for_people("x")):
        with pytest.raises(type(error)), guard:
            raise error
