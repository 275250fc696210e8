"""One operation in one transaction: reads, writes, audit records, what gateways are told. All of it or nothing."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.audit.chain import append
from helixflow.auth.audit.entry import AuditEntry
from helixflow.auth.authentication import Authentication
from helixflow.auth.caller import Caller, Source, denied
from helixflow.auth.changes import ChangeFeed
from helixflow.auth.lookups import Lookups
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import Permission
from helixflow.rpc.access import Access, Level
from helixflow.rpc.generated.auth_v1 import identity_pb2 as pb
from helixflow.storage.engine import Database
from helixflow.storage.schema import changes, installation


class Unit:
    """A transaction in the name of `caller`. `now` is seconds since the epoch.

    An operation at Level.PROJECT must call `authorise` with the project that it is about, or the dispatcher takes all
    of it back. One that writes must `record` what it did.
    """

    def __init__(self, connection: AsyncConnection, caller: Caller, access: Access, action: str, now: int) -> None:
        self.connection = connection
        self.caller = caller
        self.now = now
        # What the operation's preparation gave, see `Operation`.
        self.prepared: Any = None
        self._access = access
        self._action = action
        self.authorised = access.level is not Level.PROJECT
        # The project that `authorise` was asked for, '' for the organisation; None: it was not asked.
        self.place: str | None = None
        self.entries: list[AuditEntry] = []

    @property
    def permission(self) -> Permission | None:
        """What the operation's declaration asks for."""
        return self._access.permission

    def authorise(self, project_id: str | None) -> None:
        """Checks the operation's permission in that project, or with None (or '') in the whole organisation.

        Look the project up first: in another organisation it is NOT_FOUND, not forbidden. Raises PERMISSION_DENIED.
        """
        permission = self._access.permission
        if permission is None or not self.caller.grants.allows(permission, project_id or None):
            raise denied(self._access)
        self.authorised = True
        self.place = project_id or ""

    def authorise_some(self) -> frozenset[str] | None:
        """For lists: the projects in which the operation's permission holds, None for the whole organisation.

        Raises PERMISSION_DENIED when it holds nowhere.
        """
        permission = self._access.permission
        if permission is None or not self.caller.grants.allows_somewhere(permission):
            raise denied(self._access)
        self.authorised = True
        if self.caller.grants.allows(permission):
            return None
        return frozenset(project for project, held in self.caller.grants.projects.items() if permission in held)

    def record(
        self,
        target_kind: str,
        target_id: str,
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        organisation_id: str | None = None,
        action: str | None = None,
    ) -> None:
        """Adds a record to the audit log of the caller's organisation, or of the one given ('' is the installation)."""
        if organisation_id is None:
            organisation_id = self.caller.organisation_id
        self.entries.append(
            AuditEntry(organisation_id, self.caller, action or self._action, target_kind, target_id, before, after)
        )

    async def change(
        self,
        kind: "pb.ChangeKind.ValueType",
        subject_id: str,
        *,
        organisation_id: str = "",
        key_hash: bytes | None = None,
    ) -> int:
        """Tells the gateways, once this is committed; returns the change's revision."""
        bump = update(installation).where(installation.c.name == "revision").values(number=installation.c.number + 1)
        revision: int = (await self.connection.execute(bump.returning(installation.c.number))).scalar_one()
        await self.connection.execute(
            insert(changes).values(
                revision=revision,
                kind=kind,
                subject_id=subject_id,
                organisation_id=organisation_id,
                key_hash=key_hash,
                at=self.now,
            )
        )
        return revision


class Units:
    """Makes units. Failures of the database come out as `HelixError`s of `storage`."""

    def __init__(self, database: Database, clock: Clock, feed: ChangeFeed) -> None:
        self._database = database
        self._clock = clock
        self._feed = feed
        self.lookups = Lookups(database)

    @property
    def now(self) -> int:
        """Seconds since the epoch."""
        return int(self._clock.now())

    async def identify(self, authentication: Authentication, credential: str, source: Source) -> Caller:
        """Who calls. Raises as `Authentication.identify`."""
        async with self._database.reading() as connection:
            return await authentication.identify(connection, credential, source)

    @asynccontextmanager
    async def reading(self, caller: Caller, access: Access, action: str) -> AsyncIterator[Unit]:
        """A unit that only reads: a consistent view."""
        async with self._database.reading() as connection:
            yield Unit(connection, caller, access, action, self.now)

    @asynccontextmanager
    async def writing(self, caller: Caller, access: Access, action: str) -> AsyncIterator[Unit]:
        """A unit that is alone in writing. Its audit records are appended last, in the same transaction.

        Do nothing slow within: hash passwords and make keys before.
        """
        try:
            async with self._database.writing() as connection:
                unit = Unit(connection, caller, access, action, self.now)
                yield unit
                if not unit.authorised:
                    raise HelixError(ErrorKind.INTERNAL, f"{action} did not check the project that it is about.")
                await append(connection, unit.entries, unit.now)
        finally:
            # Also when the caller has gone in the moment of the commit.
            self._feed.wake()
