"""Guessing gets slower with each failure: by e-mail, whether or not it has an account, and by address.

An attempt counts before it is tried, so that many at once are no more than one after the other; one that succeeds is
taken back. All of it is in the database: a restart forgives nothing, and control processes share it.
"""

from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any, Final

from sqlalchemy import Row, case, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.sealing import Sealer
from helixflow.auth.texts import email_key
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.storage.schema import sign_in_failures

EMAIL_FAILURES: Final = 5
# Many people may share an address.
ADDRESS_FAILURES: Final = 20
LONGEST_LOCK_S: Final = 15 * 60
FORGOTTEN_AFTER_S: Final = 24 * 3600
_IPV6_SITE_BITS: Final = 64


def lock_s(failures: int, threshold: int) -> int:
    """For how many seconds no further attempt is taken after that many: 1, 2, 4 … from the threshold on."""
    if failures < threshold:
        return 0
    return min(LONGEST_LOCK_S, 1 << min(failures - threshold, 10))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt that has been counted, with the end of the lock that it set for each subject.

    `failures` on the e-mail so far, this one included. `locked_s`: how long the next one has to wait if this one fails.
    """

    locks: tuple[tuple[bytes, int], ...]
    failures: int
    locked_s: int


class Lockout:
    """Counts attempts under keyed hashes: the table does not say who tried to sign in."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    async def count(self, unit: Unit, email: str) -> Attempt:
        """Counts an attempt on `email` from the caller's address, as failed for now. Commit before trying it.

        Raises `HelixError` TOO_MANY_ATTEMPTS while locked; nothing is then counted.
        """
        counted = []
        for subject, threshold in self._subjects(email, unit.caller.source.address):
            row = await _find(unit.connection, subject)
            if row is not None and row.locked_until > unit.now:
                raise HelixError(
                    ErrorKind.TOO_MANY_ATTEMPTS,
                    "Too many failed attempts. Wait, then try again.",
                    retry_after_s=row.locked_until - unit.now,
                )
            known = row.failures if row is not None and row.last_at > unit.now - FORGOTTEN_AFTER_S else 0
            counted.append((subject, row is None, known + 1, lock_s(known + 1, threshold)))
        for subject, new, failures, locked_s in counted:
            values = {"failures": failures, "last_at": unit.now, "locked_until": unit.now + locked_s}
            if new:
                await unit.connection.execute(insert(sign_in_failures).values(subject=subject, **values))
            else:
                await unit.connection.execute(_where(update(sign_in_failures), subject).values(values))
        locks = tuple((subject, unit.now + locked_s) for subject, *_, locked_s in counted)
        return Attempt(locks, counted[0][2], max(locked_s for *_, locked_s in counted))

    async def take_back(self, unit: Unit, attempt: Attempt) -> None:
        """It was no failure: the attempt, and the lock that came with it, count no more. Earlier failures still do."""
        until = sign_in_failures.c.locked_until
        for subject, own_lock in attempt.locks:
            await unit.connection.execute(
                _where(update(sign_in_failures), subject)
                .where(sign_in_failures.c.failures > 0)
                .values(
                    failures=sign_in_failures.c.failures - 1,
                    # A later attempt may have set another one.
                    locked_until=case((until == own_lock, 0), else_=until),
                )
            )

    async def forgive(self, unit: Unit, email: str) -> None:
        """Whoever signed in entirely, or set a new password, starts anew with that e-mail; the address does not."""
        await unit.connection.execute(_where(delete(sign_in_failures), self._email_subject(email)))

    def _subjects(self, email: str, address: str) -> list[tuple[bytes, int]]:
        subjects = [(self._email_subject(email), EMAIL_FAILURES)]
        if address:
            subjects.append((self._sealer.digest("lockout/address", _site(address).encode()), ADDRESS_FAILURES))
        return subjects

    def _email_subject(self, email: str) -> bytes:
        return self._sealer.digest("lockout/email", email_key(email).encode())


async def prune_failures(unit: Unit) -> None:
    """Removes failures of more than a day ago."""
    old = sign_in_failures.c.last_at <= unit.now - FORGOTTEN_AFTER_S
    await unit.connection.execute(delete(sign_in_failures).where(old))


async def _find(connection: AsyncConnection, subject: bytes) -> Row[Any] | None:
    return (await connection.execute(_where(select(sign_in_failures), subject))).first()


def _where(statement: Any, subject: bytes) -> Any:
    return statement.where(sign_in_failures.c.subject == subject)


def _site(address: str) -> str:
    """What one person is taken to have: an IPv4 address, a /64 of IPv6."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(IPv6Network((int(parsed), _IPV6_SITE_BITS), strict=False))
    return str(parsed)
