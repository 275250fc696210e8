"""Whether somebody knows the password of an account: tried in turn, counted and recorded when it is wrong."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from sqlalchemy import Row, bindparam, select

from helixflow.auth.attempts import Attempts
from helixflow.auth.audit.entry import INSTALLATION, AuditEntry, Outcome
from helixflow.auth.caller import CallerKind
from helixflow.auth.dispatch import Invocation
from helixflow.auth.grants import Reader
from helixflow.auth.lockout import Failure, Lockout
from helixflow.auth.passwords import Passwords, check_length
from helixflow.auth.sessions import find_session
from helixflow.auth.texts import MAX_EMAIL_CHARS, email_key
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.storage.schema import accounts

_Find = Callable[[Reader], Awaitable[Row[Any] | None]]
# Built once: making a statement takes longer than to run it.
_FIND_BY_ID: Final = select(accounts).where(accounts.c.id == bindparam("account_id"), accounts.c.deleted_at.is_(None))
_FIND_BY_EMAIL: Final = select(accounts).where(accounts.c.email_key == bindparam("key"))
_WRONG: Final = "The e-mail or the password is wrong."


class PasswordProof:
    """Takes the same time and gives the same answer for an e-mail without an account, an account without a password and
    a wrong password. The row that it gives is the account as it was: `recheck` it in the transaction that follows.
    """

    def __init__(self, passwords: Passwords, lockout: Lockout) -> None:
        self._passwords = passwords
        self._lockout = lockout
        self._attempts = Attempts(lockout)

    async def by_email(self, invocation: Invocation, email: str, password: str) -> Row[Any]:
        """Raises `HelixError`: INVALID_CREDENTIALS, TOO_MANY_ATTEMPTS, UNPROCESSABLE for what is too long."""
        if len(email) > MAX_EMAIL_CHARS:
            raise HelixError(ErrorKind.UNPROCESSABLE, "This e-mail is too long.", param="email")
        check_length(password)
        find = partial(find_account_by_email, email=email)
        return await self._verify(invocation, find, email, password, "password", _WRONG)

    async def of_caller(self, invocation: Invocation, password: str, param: str = "current_password") -> Row[Any]:
        """The caller's own password. Raises as `by_email`, and PERMISSION_DENIED for who is no account."""
        check_length(password, param)
        async with invocation.reading() as unit:
            account = await find_own_account(unit)
        find = partial(find_account, account_id=account.id)
        return await self._verify(invocation, find, account.email, password, param, "The password is wrong.")

    async def _verify(
        self, invocation: Invocation, find: _Find, email: str, password: str, param: str, message: str
    ) -> Row[Any]:
        async with self._attempts.turn(invocation, email) as attempt:
            try:
                account = await find(invocation.lookups)
                stored = account.password_hash if account is not None else None
                right = await self._passwords.verify(password, stored, param)
            except HelixError:
                # It was not tried.
                async with invocation.writing() as unit:
                    await self._lockout.release(unit, attempt)
                raise
            async with invocation.writing() as unit:
                if account is not None and right:
                    await self._lockout.release(unit, attempt)
                    return account
                failure = await self._lockout.fail(unit, attempt)
                record_failure(unit, invocation.action, account, failure, email)
        raise HelixError(ErrorKind.INVALID_CREDENTIALS, message, param=param if param != "password" else None)


async def recheck(unit: Unit, account: Row[Any]) -> Row[Any]:
    """The account as it is now. Raises `HelixError`: INVALID_CREDENTIALS if its password has changed since,
    INVALID_TOKEN if the caller's session has ended.
    """
    await _check_session(unit)
    row = await find_account(unit.connection, account.id)
    if row is None or row.password_hash != account.password_hash:
        raise HelixError(ErrorKind.INVALID_CREDENTIALS, "The password has changed meanwhile.")
    return row


def record_failure(unit: Unit, action: str, account: Row[Any] | None, failure: Failure, email: str = "") -> None:
    """Into the audit log of the account's home; without an account, into that of the installation."""
    chain, target = (account.home_organisation_id, account.id) if account is not None else (INSTALLATION, mask(email))
    after = {"failures": failure.failures, "locked_s": failure.locked_s}
    record_denial(unit, action, chain, target, ErrorKind.INVALID_CREDENTIALS, after)


def record_denial(
    unit: Unit, action: str, chain: str, target_id: str, kind: ErrorKind, after: dict[str, Any] | None = None
) -> None:
    """An attempt to be the user `target_id` that was refused."""
    denied = AuditEntry(
        chain, unit.caller, action, "user", target_id, None, after, outcome=Outcome.DENIED, reason=kind.value
    )
    unit.entries.append(denied)


async def find_account(reader: Reader, account_id: str) -> Row[Any] | None:
    """Its row, unless it is deleted."""
    return (await reader.execute(_FIND_BY_ID, {"account_id": account_id})).first()


async def find_account_by_email(reader: Reader, email: str) -> Row[Any] | None:
    """The row of the account with that e-mail, in whatever case; deleted ones have none."""
    return (await reader.execute(_FIND_BY_EMAIL, {"key": email_key(email)})).first()


async def find_own_account(unit: Unit) -> Row[Any]:
    """The caller's row. Raises `HelixError`: PERMISSION_DENIED for keys and service accounts, INVALID_TOKEN if the
    session has ended since the caller was let in.
    """
    await _check_session(unit)
    row = await find_account(unit.connection, unit.caller.id) if unit.caller.kind is CallerKind.ACCOUNT else None
    if row is None:
        raise HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: only who has signed in can do this.")
    return row


async def _check_session(unit: Unit) -> None:
    session_id = unit.caller.session_id
    if session_id and await find_session(unit, session_id) is None:
        raise HelixError(ErrorKind.INVALID_TOKEN, "The session has ended. Sign in again.")


def mask(email: str) -> str:
    """What is kept of an e-mail without an account: somebody may have typed a password there."""
    local, at, domain = email.partition("@")
    return f"{local[:1]}…@{domain[:1]}…" if at else "…"
