"""SessionService without sockets, on top of `tests.harness.auth`: real passwords, real tokens, a fake clock.

door = await SignIns.open(database)
ada = await door.add_account("ada@example.com")
answer = await door.login("ada@example.com")
me = await door.ask(answer.access_token, "GetSelf", pb.GetSelfRequest())
"""

import base64
from dataclasses import dataclass
from typing import Any, Self, cast

import grpc
import jwt
from argon2 import PasswordHasher
from google.protobuf.message import Message
from sqlalchemy import select, update

from helixflow.auth.authentication import Authentication
from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.dispatch import Dispatcher
from helixflow.auth.idempotency import Idempotency
from helixflow.auth.session_service import session_operations
from helixflow.auth.sign_in import SignIn, place_of
from helixflow.auth.signing_key_rotation import FIRST_ANNOUNCED_S, SigningKeyRotation
from helixflow.auth.signing_keys import SigningKeys
from helixflow.auth.tokens import AccessTokens
from helixflow.auth.totp import STEP_S, code_at
from helixflow.core.clock import FakeClock
from helixflow.rpc.access import AUTHORIZATION, CLIENT_ADDRESS, CLIENT_SOFTWARE, REQUEST_ID, Access, Level
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.storage.engine import Database
from helixflow.storage.schema import accounts, one_time_tokens, organisations
from tests.harness.auth import REQUEST, Installation, Person
from tests.harness.tokens import signing_key

SESSION_SERVICE = pb.DESCRIPTOR.services_by_name["SessionService"]
ISSUER, AUDIENCE = "https://auth.example.com", "helixflow-test"
PASSWORD = "a long enough pass phrase"
WRONG = "another long pass phrase"
ADDRESS = "192.0.2.1"


class SignIns(Installation):
    """An installation whose accounts can really sign in."""

    def __init__(self, database: Database, clock: FakeClock | None = None, *, key: str = "first", **more: Any) -> None:
        super().__init__(database, clock, **more)
        self.keys = SigningKeys(database, self.sealer, self.clock)
        self.next_key = key
        self.rotation = SigningKeyRotation(
            self.units, self.keys, self.sealer, generate=lambda: signing_key(self.next_key, 4096)
        )
        self.tokens = AccessTokens(self.keys, self.clock, issuer=ISSUER, audience=AUDIENCE)
        authentication = Authentication(self.tokens.read, self.clock)
        self.sessions = Dispatcher(self.units, authentication, Idempotency(self.sealer), self.refusals)
        operations = session_operations(self.passwords, self.sealer, self.keys, self.tokens)
        self._session_handler = self.sessions.handler(SESSION_SERVICE, operations)
        self._hash = ""

    @classmethod
    async def open(cls, database: Database) -> Self:
        """With a signing key that is in use."""
        door = cls(database)
        await door.rotation.ensure_first()
        door.clock.advance(FIRST_ANNOUNCED_S)
        await door.keys.refresh()
        return door

    async def close(self) -> None:
        await self.sessions.finish()
        await super().close()

    async def ask(self, credential: str | None, rpc: str, request: Message, *, address: str = ADDRESS) -> Any:
        """The answer to an RPC of SessionService. Raises what it does."""
        metadata = [(REQUEST_ID, REQUEST), (CLIENT_ADDRESS, address), (CLIENT_SOFTWARE, "browser%20of%20tests")]
        if credential:
            metadata.append((AUTHORIZATION, f"Bearer {credential}"))
        details = _Details(f"/{SESSION_SERVICE.full_name}/{rpc}", tuple(metadata))
        handler = self._session_handler.service(cast(grpc.HandlerCallDetails, details))
        assert handler is not None
        arrived = handler.request_deserializer(request.SerializeToString())
        return await handler.unary_unary(arrived, _Context(tuple(metadata)))  # type: ignore[misc]

    async def login(
        self, email: str, password: str = PASSWORD, *, address: str = ADDRESS, **more: str
    ) -> pb.LoginResponse:
        request = pb.LoginRequest(email=email, password=password, **more)
        return cast(pb.LoginResponse, await self.ask(None, "Login", request, address=address))

    async def enter(self, person: Person, organisation_id: str = "") -> pb.LoginResponse:
        """What a sign-in gives, without the password and the time that it takes."""
        sign_in = SignIn(self.tokens)
        async with self.system() as unit:
            (account,) = (await unit.connection.execute(select(accounts).where(accounts.c.id == person.id))).all()
            place = await place_of(unit, account, organisation_id, "")
            admission = await sign_in.open(unit, account, place, "password")
        return await sign_in.answer(admission)

    async def refresh(self, token: str, **more: str) -> pb.LoginResponse:
        return cast(pb.LoginResponse, await self.ask(None, "Refresh", pb.RefreshRequest(refresh_token=token, **more)))

    async def add_account(
        self, email: str = "ada@example.com", *, roles: dict[str, str] | None = None, **more: Any
    ) -> Person:
        """An owner of a new organisation with `PASSWORD`, unless told otherwise."""
        if "organisation_id" in more:
            organisation_id = more.pop("organisation_id")
        else:
            organisation_id = await self.add_organisation()
        person = await self.add_person(
            organisation_id, email=email, roles={"": "owner"} if roles is None else roles, **more
        )
        if more.get("password", True):
            self._hash = self._hash or await self.passwords.rehash(PASSWORD)
            await self.set(person, password_hash=self._hash)
        return person

    async def set(self, person: Person, **values: Any) -> None:
        async with self.database.writing() as connection:
            await connection.execute(update(accounts).where(accounts.c.id == person.id).values(**values))

    def system(self) -> Any:
        """A writing unit of nobody in particular."""
        return self.units.writing(Caller(CallerKind.SYSTEM), Access(Level.SERVICE, None, True, False), "rotate")

    @staticmethod
    def kid(answer: pb.LoginResponse) -> str:
        return str(jwt.get_unverified_header(answer.access_token)["kid"])

    @staticmethod
    def claims(answer: pb.LoginResponse) -> dict[str, Any]:
        return jwt.decode(answer.access_token, options={"verify_signature": False})

    async def rename_role_of_invitations(self, role: str) -> None:
        """As if theirs were gone; the operations prevent that."""
        async with self.database.writing() as connection:
            await connection.execute(update(one_time_tokens).values(role=role))

    async def delete_organisation(self, organisation_id: str) -> None:
        async with self.database.writing() as connection:
            await connection.execute(
                update(organisations).where(organisations.c.id == organisation_id).values(deleted_at=self.now)
            )

    @staticmethod
    def weak_hash(password: str) -> str:
        """As an older version might have made it."""
        return PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1).hash(password)

    async def turn_on_mfa(self, token: str) -> tuple[bytes, list[str]]:
        """The secret and the recovery codes of whom the access token is for."""
        enrolled = await self.ask(token, "EnrolMfa", pb.EnrolMfaRequest(current_password=PASSWORD))
        secret = base64.b32decode(enrolled.secret + "=" * (-len(enrolled.secret) % 8))
        confirmed = await self.ask(token, "ConfirmMfa", pb.ConfirmMfaRequest(code=self.code(secret)))
        # That code has been used up.
        self.clock.advance(STEP_S)
        return secret, list(confirmed.codes)

    def code(self, secret: bytes, steps: int = 0) -> str:
        return code_at(secret, self.now // STEP_S + steps)


@dataclass(frozen=True, slots=True)
class _Details:
    method: str
    invocation_metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Context:
    metadata: tuple[tuple[str, str], ...]

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata
