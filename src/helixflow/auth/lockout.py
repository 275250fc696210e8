"""Guessing gets slower with each failure: by e-mail, whether or not it has an account, and by address.

An attempt is reserved before it is tried, so that many at once are no more than one after the other, and only real
failures are counted. All of it is in the database: a restart forgives nothing, and control processes share it.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any, Final

from sqlalchemy import LargeBinary, Row, bindparam, delete, insert, or_, select, update

from helixflow.auth.failure_tally import BY_ADDRESS, BY_EMAIL, FORGOTTEN_AFTER_S, Limit, Tally
from helixflow.auth.grants import Reader
from helixflow.auth.sealing import Sealer
from helixflow.auth.texts import email_key
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.storage.schema import sign_in_attempts, sign_in_failures

# Longer than any attempt takes: whoever tried it died, and nobody knows how it ended.
ABANDONED_AFTER_S: Final = 60
_IPV6_SITE_BITS: Final = 64
# Built once: making a statement takes longer than to run it.
_subject, _other = bindparam("subject", type_=LargeBinary()), bindparam("other", type_=LargeBinary())
_FIND_FAILURES: Final = select(sign_in_failures).where(sign_in_failures.c.subject.in_([_subject, _other]))
_FIND_ATTEMPTS: Final = select(sign_in_attempts).where(
    or_(sign_in_attempts.c.email_subject == _subject, sign_in_attempts.c.address_subject == _other)
)


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt to be somebody, known by keyed hashes of the e-mail and (None when not known) of the address."""

    email: bytes
    address: bytes | None
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    @property
    def subjects(self) -> Sequence[tuple[bytes, Limit]]:
        by_email = (self.email, BY_EMAIL)
        return (by_email,) if self.address is None else (by_email, (self.address, BY_ADDRESS))


@dataclass(frozen=True, slots=True)
class Failure:
    """`failures` on the e-mail so far, this one included. `locked_s`: how long the next attempt has to wait."""

    failures: int
    locked_s: int


class Lockout:
    """Counts under keyed hashes: the table does not say who tried to sign in."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def attempt(self, email: str, address: str) -> Attempt:
        """Nothing is counted yet."""
        site = self._sealer.digest("lockout/address", _site(address).encode()) if address else None
        return Attempt(self._email_subject(email), site)

    async def admits(self, reader: Reader, attempt: Attempt, now: int) -> bool:
        """False while as many others are being tried as may be. Raises `HelixError` TOO_MANY_ATTEMPTS while locked."""
        tallies = await _find_tallies(reader, attempt)
        for tally in tallies:
            _check_lock(tally, now)
        began: dict[bytes, list[int]] = {subject: [] for subject, _ in attempt.subjects}
        for row in await reader.execute(_FIND_ATTEMPTS, {"subject": attempt.email, "other": attempt.address}):
            for subject in began.keys() & {row.email_subject, row.address_subject}:
                began[subject].append(row.began_at)
        return all(
            tally.at(now).admits(*_split(times, now)) for tally, times in zip(tallies, began.values(), strict=True)
        )

    async def check(self, reader: Reader, attempt: Attempt, now: int) -> None:
        """For what is tried within one writing unit. Raises `HelixError` TOO_MANY_ATTEMPTS while locked."""
        for tally in await _find_tallies(reader, attempt):
            _check_lock(tally, now)

    async def reserve(self, unit: Unit, attempt: Attempt) -> bool:
        """As `admits`; if so the attempt is under way until `release` or `fail`. Commit before trying it."""
        if not await self.admits(unit.connection, attempt, unit.now):
            return False
        values = {"id": attempt.id, "email_subject": attempt.email, "address_subject": attempt.address}
        await unit.connection.execute(insert(sign_in_attempts).values(**values, began_at=unit.now))
        return True

    async def release(self, unit: Unit, attempt: Attempt) -> None:
        """It was no failure. Earlier failures still count."""
        await unit.connection.execute(delete(sign_in_attempts).where(sign_in_attempts.c.id == attempt.id))

    async def fail(self, unit: Unit, attempt: Attempt) -> Failure:
        """It was one, whether it was reserved or not."""
        await self.release(unit, attempt)
        tallies = [await _add_failures(unit, subject, limit) for subject, limit in attempt.subjects]
        locked_s = max(max(0, tally.locked_until - unit.now) for tally in tallies)
        return Failure(tallies[0].failures, locked_s)

    async def forgive(self, unit: Unit, email: str) -> None:
        """Whoever signed in entirely, or set a new password, starts anew with that e-mail; the address does not."""
        subject = self._email_subject(email)
        await unit.connection.execute(delete(sign_in_failures).where(sign_in_failures.c.subject == subject))

    async def credit_address(self, unit: Unit) -> None:
        """One failure of the caller's address is forgiven: somebody signed in from there."""
        address = self.attempt("", unit.caller.source.address).address
        if address is not None:
            tally = await _find_tally(unit.connection, address, BY_ADDRESS)
            if tally.failures:
                await _store(unit, address, tally.after_success(unit.now))

    def _email_subject(self, email: str) -> bytes:
        return self._sealer.digest("lockout/email", email_key(email).encode())


async def tidy_failures(unit: Unit) -> None:
    """Counts attempts that were abandoned, and removes what has not been touched for a day."""
    gone = await unit.connection.execute(
        delete(sign_in_attempts).where(_is_abandoned(unit.now)).returning(*sign_in_attempts.c)
    )
    for row in gone.all():
        for subject, limit in Attempt(row.email_subject, row.address_subject).subjects:
            await _add_failures(unit, subject, limit)
    old = sign_in_failures.c.counted_at <= unit.now - FORGOTTEN_AFTER_S
    await unit.connection.execute(delete(sign_in_failures).where(old))


def _check_lock(tally: Tally, now: int) -> None:
    if tally.locked_until > now:
        raise HelixError(
            ErrorKind.TOO_MANY_ATTEMPTS,
            "Too many failed attempts. Wait, then try again.",
            retry_after_s=tally.locked_until - now,
        )


def _is_abandoned(now: int) -> Any:
    return sign_in_attempts.c.began_at <= now - ABANDONED_AFTER_S


def _split(began: Sequence[int], now: int) -> tuple[int, int]:
    """How many attempts are under way, and how many were abandoned."""
    abandoned = sum(at <= now - ABANDONED_AFTER_S for at in began)
    return len(began) - abandoned, abandoned


async def _find_tallies(reader: Reader, attempt: Attempt) -> list[Tally]:
    """In the order of the attempt's subjects."""
    found = await reader.execute(_FIND_FAILURES, {"subject": attempt.email, "other": attempt.address})
    rows = {row.subject: row for row in found}
    return [_tally(rows.get(subject), limit) for subject, limit in attempt.subjects]


async def _find_tally(reader: Reader, subject: bytes, limit: Limit) -> Tally:
    return _tally((await reader.execute(_FIND_FAILURES, {"subject": subject, "other": None})).first(), limit)


def _tally(row: Row[Any] | None, limit: Limit) -> Tally:
    return Tally(limit) if row is None else Tally(limit, row.failures, row.counted_at, row.locked_until)


async def _add_failures(unit: Unit, subject: bytes, limit: Limit) -> Tally:
    tally = (await _find_tally(unit.connection, subject, limit)).after_failure(unit.now)
    await _store(unit, subject, tally)
    return tally


async def _store(unit: Unit, subject: bytes, tally: Tally) -> None:
    values = {"failures": tally.failures, "counted_at": tally.counted_at, "locked_until": tally.locked_until}
    known = update(sign_in_failures).where(sign_in_failures.c.subject == subject).values(values)
    if (await unit.connection.execute(known)).rowcount == 0:
        await unit.connection.execute(insert(sign_in_failures).values(subject=subject, **values))


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
