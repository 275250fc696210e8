"""The directory of API keys, over the database."""

import secrets
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.core.call import Principal
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import generate_key, hash_key, mask_key
from helixflow.storage.engine import Database
from helixflow.storage.schema import api_keys, organisations, projects, revocations

MAX_NAME_CHARS: Final = 100
# Until there are more, everything belongs to one organisation and one project. Fixed ids: made once, found again.
DEFAULT_ORGANISATION_ID: Final = "org_default"
DEFAULT_PROJECT_ID: Final = "proj_default"
# SQLite and protobuf both end here; far beyond any year that a clock shows.
_MAX_TIME: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it may be shown. Times are seconds since the epoch; 0: does not expire, is not revoked."""

    key_id: str
    name: str
    hint: str
    created_at: int
    expires_at: int
    revoked_at: int
    bootstrap: bool


@dataclass(frozen=True, slots=True)
class Revocation:
    """One revocation, in the order of `revision`."""

    revision: int
    key_hash: bytes


class KeyDirectory:
    """Creates, lists, revokes and resolves keys. Failures of the database are `HelixError`s of `storage`."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def ensure_defaults(self) -> None:
        """Makes the default organisation and project unless they exist."""
        now = int(self._clock.now())
        async with self._database.writing() as connection:
            found = await connection.execute(
                select(organisations.c.id).where(organisations.c.id == DEFAULT_ORGANISATION_ID)
            )
            if found.first() is not None:
                return
            await connection.execute(
                insert(organisations).values(id=DEFAULT_ORGANISATION_ID, name="Default", created_at=now)
            )
            await connection.execute(
                insert(projects).values(
                    id=DEFAULT_PROJECT_ID, organisation_id=DEFAULT_ORGANISATION_ID, name="Default", created_at=now
                )
            )

    async def create(self, name: str, expires_at: int = 0) -> tuple[KeyRecord, str]:
        """A new key and its secret, which is not kept. `expires_at`: seconds since the epoch, 0 for never.

        Raises `HelixError` INVALID_VALUE for a bad name or a time that has passed.
        """
        _check_name(name)
        if expires_at != 0 and not int(self._clock.now()) < expires_at <= _MAX_TIME:
            raise HelixError(ErrorKind.INVALID_VALUE, "The key would have expired already.", param="expires_at")
        secret = generate_key()
        async with self._database.writing() as connection:
            row = await self.insert_key(connection, secret, name, expires_at=expires_at, bootstrap=False)
        return row, secret

    async def list_keys(self) -> list[KeyRecord]:
        """All keys, newest first, revoked and expired ones too."""
        order = (api_keys.c.created_at.desc(), api_keys.c.id.desc())
        async with self._database.reading() as connection:
            rows = await connection.execute(select(api_keys).order_by(*order))
            return [_record(row) for row in rows]

    async def revoke(self, key_id: str) -> tuple[KeyRecord, Revocation | None]:
        """Revokes a key for good; a second time changes nothing and gives no revocation. Raises NOT_FOUND.

        A bootstrap key that gave way to another one is from then on as good as revoked by hand.
        """
        async with self._database.writing() as connection:
            row = (await connection.execute(select(api_keys).where(api_keys.c.id == key_id))).first()
            if row is None:
                raise HelixError(ErrorKind.NOT_FOUND, f"There is no key {key_id!r}.", param="key_id")
            revocation = None
            if row.revoked_at is None:
                revocation = await self.revoke_row(connection, row, superseded=False)
            elif row.superseded:
                await connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(superseded=False))
            row = (await connection.execute(select(api_keys).where(api_keys.c.id == key_id))).one()
        return _record(row), revocation

    async def resolve(self, key_hash: bytes) -> tuple[Principal, int]:
        """Whose key has this hash, and when it expires (0: never).

        Raises `HelixError` NOT_FOUND for unknown, revoked and expired keys alike.
        """
        async with self._database.reading() as connection:
            row = (await connection.execute(select(api_keys).where(api_keys.c.hash == key_hash))).first()
        if row is None or row.revoked_at is not None or self._has_expired(row):
            raise HelixError(ErrorKind.NOT_FOUND, "There is no valid key with this hash.")
        return Principal(row.id, row.name, row.organisation_id, row.project_id), row.expires_at or 0

    async def revision(self) -> int:
        """How many revocations there have ever been: the revision of the latest."""
        async with self._database.reading() as connection:
            return int((await connection.execute(select(func.max(revocations.c.revision)))).scalar() or 0)

    async def insert_key(
        self, connection: AsyncConnection, secret: str, name: str, *, expires_at: int, bootstrap: bool
    ) -> KeyRecord:
        """Stores the hash of `secret` in a transaction of the caller's."""
        values = {
            "id": f"key_{secrets.token_hex(12)}",
            "hash": hash_key(secret),
            "hint": mask_key(secret),
            "name": name,
            "organisation_id": DEFAULT_ORGANISATION_ID,
            "project_id": DEFAULT_PROJECT_ID,
            "created_at": int(self._clock.now()),
            "expires_at": expires_at or None,
            "revoked_at": None,
            "superseded": False,
            "bootstrap": bootstrap,
        }
        await connection.execute(insert(api_keys).values(values))
        return _record((await connection.execute(select(api_keys).where(api_keys.c.id == values["id"]))).one())

    async def revoke_row(self, connection: AsyncConnection, row: Row[Any], *, superseded: bool) -> Revocation:
        """Marks a valid key's row as revoked and records that, in a transaction of the caller's."""
        now = int(self._clock.now())
        change = update(api_keys).where(api_keys.c.id == row.id).values(revoked_at=now, superseded=superseded)
        await connection.execute(change)
        added = await connection.execute(
            insert(revocations).values(key_id=row.id, revoked_at=now).returning(revocations.c.revision)
        )
        return Revocation(revision=added.scalar_one(), key_hash=row.hash)

    def _has_expired(self, row: Row[Any]) -> bool:
        return row.expires_at is not None and self._clock.now() >= row.expires_at


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or not name.strip():
        message = f"A key's name has 1 to {MAX_NAME_CHARS} printable characters."
        raise HelixError(ErrorKind.INVALID_VALUE, message, param="name")


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        row.id, row.name, row.hint, row.created_at, row.expires_at or 0, row.revoked_at or 0, row.bootstrap
    )
