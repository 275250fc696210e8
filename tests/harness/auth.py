"""The auth service without sockets: operations run through the real dispatcher, on a fresh database, at a fake time.

`Installation` makes organisations, projects and people directly in the tables and calls RPCs as any of them:

    auth = Installation(database)
    acme = await auth.add_organisation("Acme")
    project = await auth.add_project(acme, "Search")
    ada = await auth.add_person(acme, roles={"": "owner"})
    bob = await auth.add_person(acme, roles={project: "developer"})
    made = await auth.call(ada, "CreateProject", pb.CreateProjectRequest(name="New"))

Sessions are rows as a sign-in makes them. Access tokens are their claims as JSON: signatures are tested elsewhere.
"""

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from google.protobuf.message import Message
from sqlalchemy import Row, Table, insert, select

from helixflow.auth import (
    dissolution,
    invitations,
    keys,
    members,
    organisations,
    projects,
    roles,
    service_accounts,
    user_status,
    users,
)
from helixflow.auth.audit.checkpoints import Checkpoints
from helixflow.auth.audit.operations import audit_operations
from helixflow.auth.audit.refusals import Refusals
from helixflow.auth.authentication import Authentication
from helixflow.auth.changes import ChangeFeed
from helixflow.auth.common_passwords import CommonPasswords
from helixflow.auth.configuration.rules import PLAIN, Rules
from helixflow.auth.configuration.service import Found, ServingService
from helixflow.auth.dispatch import Dispatcher
from helixflow.auth.fleet import Fleet, NoPools, Pools
from helixflow.auth.idempotency import Idempotency
from helixflow.auth.metering import MeteringService
from helixflow.auth.password_rules import PasswordRules
from helixflow.auth.passwords import Passwords
from helixflow.auth.sealing import KEY_BYTES, Sealer
from helixflow.auth.session_service import signing_key_operations
from helixflow.auth.signing_key_rotation import SigningKeyRotation
from helixflow.auth.signing_keys import SigningKeys
from helixflow.auth.texts import email_key
from helixflow.auth.unit import Units
from helixflow.core.claims import AccessClaims
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import generate_key, hash_key, mask_key
from helixflow.rpc.access import AUTHORIZATION, CLIENT_ADDRESS, IDEMPOTENCY_KEY, REQUEST_ID
from helixflow.rpc.generated.auth_v1 import admin_pb2, configuration_pb2, fleet_pb2, usage_pb2
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database
from helixflow.storage.schema import (
    accounts,
    api_keys,
    audit_records,
    changes,
    memberships,
    sessions,
)
from helixflow.storage.schema import organisations as organisation_rows
from helixflow.storage.schema import projects as project_rows

TOKEN_LIFE_S = 72 * 3600
CONFIGURATION_SERVICE = configuration_pb2.DESCRIPTOR.services_by_name["ConfigurationService"]
ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
FLEET_SERVICE = fleet_pb2.DESCRIPTOR.services_by_name["FleetService"]
USAGE_SERVICE = usage_pb2.DESCRIPTOR.services_by_name["UsageService"]
# A real argon2id hash takes 25 ms; that there is one is all that matters to administration.
SOME_HASH = "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHRzb21lc2FsdA$AAAA"
REQUEST = "req_test"


@dataclass(frozen=True, slots=True)
class Person:
    """An account with an open session in `organisation_id`. `credential` is its access token."""

    id: str
    email: str
    organisation_id: str
    credential: str


class Installation:
    """What AdminService and UsageService consist of, but the transport. `clock` moves when told to.

    `metering` is MeteringService, with the prices that `settings` say; `serving` is ServingService, which begins with
    what is `found` when the configuration is first asked for.
    """

    def __init__(
        self,
        database: Database,
        clock: FakeClock | None = None,
        *,
        master_key: bytes = bytes(KEY_BYTES),
        settings: Settings | None = None,
        pools: Pools | None = None,
        rules: Rules = PLAIN,
    ) -> None:
        self.database = database
        self.clock = clock or FakeClock()
        self.units = Units(database, self.clock, ChangeFeed(database, self.clock))
        self.sealer = Sealer(master_key)
        self.authentication = Authentication(self._read_token, self.clock)
        self.refusals = Refusals(database, self.clock)
        self.dispatcher = Dispatcher(self.units, self.authentication, Idempotency(self.sealer), self.refusals)
        self.passwords = Passwords(PasswordRules(12, CommonPasswords()), self.clock, workers=1)
        self.metering = MeteringService(settings or Settings(), database, self.clock)
        self.serving = ServingService(self.units, self.sealer, rules)
        self.found = Found.of(settings or Settings())
        self._begun = False
        self._handlers = {
            CONFIGURATION_SERVICE: self.dispatcher.handler(CONFIGURATION_SERVICE, self.serving.operations()),
            ADMIN_SERVICE: self.dispatcher.handler(ADMIN_SERVICE, self._operations()),
            USAGE_SERVICE: self.dispatcher.handler(USAGE_SERVICE, self.metering.operations()),
            FLEET_SERVICE: self.dispatcher.handler(FLEET_SERVICE, Fleet(pools or NoPools()).operations()),
        }

    @property
    def now(self) -> int:
        return int(self.clock.now())

    async def close(self) -> None:
        await self.dispatcher.finish()
        self.passwords.close()

    async def call(
        self,
        caller: "Person | str | None",
        rpc: str,
        request: Message,
        *,
        idempotency_key: str = "",
        address: str = "",
    ) -> Any:
        """The answer to an RPC of one of its services. `caller` is a person, a credential, or None for nobody.

        Raises what the RPC does, `HelixError` for instance.
        """
        credential = caller.credential if isinstance(caller, Person) else caller
        metadata = [(REQUEST_ID, REQUEST)]
        if credential:
            metadata.append((AUTHORIZATION, f"Bearer {credential}"))
        if idempotency_key:
            metadata.append((IDEMPOTENCY_KEY, idempotency_key))
        if address:
            metadata.append((CLIENT_ADDRESS, address))
        service = next(service for service in self._handlers if rpc in service.methods_by_name)
        details = _Details(f"/{service.full_name}/{rpc}", tuple(metadata))
        if service is CONFIGURATION_SERVICE and not self._begun:
            self._begun = True
            await self.serving.begin(self.found)
        handler = self._handlers[service].service(cast(grpc.HandlerCallDetails, details))
        assert handler is not None
        context = _Context(tuple(metadata))
        if handler.response_streaming:
            return [message async for message in handler.unary_stream(request, context)]  # type: ignore[misc]
        # Over the wire and back, as a client's would go.
        arrived = handler.request_deserializer(request.SerializeToString())
        return await handler.unary_unary(arrived, context)  # type: ignore[misc]

    async def add_organisation(self, name: str = "Acme", *, organisation_id: str = "") -> str:
        organisation_id = organisation_id or _id("org")
        await self._insert(
            organisation_rows, id=organisation_id, name=name, **organisations.NEW_ORGANISATION, **self._stamps()
        )
        return organisation_id

    async def add_project(self, organisation_id: str, name: str = "Search", *, project_id: str = "") -> str:
        project_id = project_id or _id("proj")
        await self._insert(project_rows, id=project_id, organisation_id=organisation_id, name=name, **self._stamps())
        return project_id

    async def add_person(
        self,
        organisation_id: str,
        *,
        roles: Mapping[str, str] | None = None,
        email: str = "",
        home: str = "",
        operator: bool = False,
        password: bool = True,
        suspended: bool = False,
    ) -> Person:
        """An account of that organisation, or of `home`, with `roles` by project id ('' in the organisation)."""
        account_id = _id("user")
        email = email or f"{account_id}@example.com"
        await self._insert(
            accounts,
            id=account_id,
            email=email,
            email_key=email_key(email),
            name="Somebody",
            password_hash=SOME_HASH if password else None,
            home_organisation_id=home or organisation_id,
            operator=operator,
            totp_used=0,
            suspended_at=self.now if suspended else None,
            **self._stamps(),
        )
        for project_id, role in (roles or {}).items():
            await self.add_membership(account_id, organisation_id, role, project_id)
        return Person(account_id, email, organisation_id, await self.sign_in(account_id, organisation_id))

    async def add_membership(self, account_id: str, organisation_id: str, role: str, project_id: str = "") -> None:
        await self._insert(
            memberships,
            account_id=account_id,
            organisation_id=organisation_id,
            project_id=project_id,
            role=role,
            **self._stamps(),
        )

    async def sign_in(self, account_id: str, organisation_id: str, project_id: str = "") -> str:
        """An access token of a new session."""
        session_id = _id("ses")
        await self._insert(
            sessions,
            id=session_id,
            account_id=account_id,
            organisation_id=organisation_id,
            family_id=session_id,
            project_id=project_id,
            method="password",
            address="192.0.2.1",
            user_agent="test",
            created_at=self.now,
            refreshed_at=self.now,
            expires_at=self.now + 86_400,
            last_until=self.now + 30 * 86_400,
        )
        claims = AccessClaims(
            iss="helixflow",
            sub=account_id,
            aud="helixflow",
            exp=self.now + 3600,
            iat=self.now,
            nbf=self.now,
            jti=secrets.token_hex(8),
            org=organisation_id,
            project=project_id,
            roles=[],
            scope="",
            sid=session_id,
            rev=0,
        )
        return msgspec.json.encode(claims).decode()

    async def add_key(
        self,
        organisation_id: str,
        project_id: str,
        *,
        scopes: Sequence[str] = (),
        owner_id: str = "",
        networks: Sequence[str] = (),
        bootstrap: bool = False,
    ) -> tuple[str, str]:
        """The id of a new key, and the key."""
        secret, key_id = generate_key(), _id("key")
        await self._insert(
            api_keys,
            id=key_id,
            hash=hash_key(secret),
            hint=mask_key(secret),
            name="a key",
            organisation_id=organisation_id,
            project_id=project_id,
            owner_id=owner_id,
            scopes=sorted(scopes),
            models=[],
            networks=[*networks],
            priority=0,
            weight=100,
            created_by="",
            superseded=False,
            bootstrap=bootstrap,
            **self._stamps(),
        )
        return key_id, secret

    async def rows(self, table: Table, **where: Any) -> Sequence[Row[Any]]:
        """The rows of a table with those values, in the order of its key."""
        query = select(table).order_by(*table.primary_key)
        return await self.database.fetch_all(query.where(*(table.c[name] == value for name, value in where.items())))

    async def audited(self, organisation_id: str, **where: Any) -> list[Row[Any]]:
        """The audit records of an organisation ('' of the installation), oldest first."""
        await self.refusals.write()
        return list(await self.rows(audit_records, organisation_id=organisation_id, **where))

    async def told(self) -> list[tuple[int, str, str]]:
        """Kind, subject and organisation of what gateways have been told, oldest first."""
        return [(row.kind, row.subject_id, row.organisation_id) for row in await self.rows(changes)]

    def _stamps(self) -> dict[str, int]:
        return {"created_at": self.now, "updated_at": self.now, "version": 1}

    async def _insert(self, table: Table, **values: Any) -> None:
        async with self.database.writing() as connection:
            await connection.execute(insert(table).values(**values))

    def _operations(self) -> Mapping[str, Any]:
        rotation = SigningKeyRotation(
            self.units, SigningKeys(self.database, self.sealer, self.clock), self.sealer, generate=_small_key
        )
        return {
            **organisations.operations(TOKEN_LIFE_S),
            **projects.OPERATIONS,
            **dissolution.OPERATIONS,
            **users.operations(self.passwords, TOKEN_LIFE_S),
            **user_status.operations(TOKEN_LIFE_S),
            **invitations.operations(TOKEN_LIFE_S),
            **members.OPERATIONS,
            **roles.OPERATIONS,
            **service_accounts.OPERATIONS,
            **keys.OPERATIONS,
            **audit_operations(Checkpoints(self.database, self.sealer)),
            **signing_key_operations(rotation),
        }

    @staticmethod
    def _read_token(token: str) -> AccessClaims:
        try:
            return msgspec.json.decode(token, type=AccessClaims)
        except msgspec.MsgspecError as exc:
            raise HelixError(ErrorKind.INVALID_TOKEN, "Not an access token of these tests.") from exc


class Rehearsal(Database):
    """A database whose writes are all undone: a thousand calls can begin from the same state."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.name = database.name
        self.fetch_all = database.fetch_all  # type: ignore[method-assign]
        self.reading = database.reading  # type: ignore[method-assign]

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Any]:
        try:
            async with self._database.writing() as connection:
                yield connection
                raise _Undone
        except _Undone:
            return


@asynccontextmanager
async def refused(kind: ErrorKind, param: str | None = None) -> AsyncIterator[None]:
    """Expects a `HelixError` of that kind, about that field."""
    with pytest.raises(HelixError) as caught:
        yield
    assert (caught.value.kind, caught.value.param) == (kind, param), caught.value.message


class _Undone(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Details:
    method: str
    invocation_metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Context:
    """As much of a gRPC context as the dispatcher looks at."""

    metadata: tuple[tuple[str, str], ...]

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata


def _small_key() -> RSAPrivateKey:
    """A key of 4096 bits takes up to 1.5 s of a core."""
    return generate_private_key(65537, 2048)


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
