"""AuthService of proto/helixflow/auth/v1 over the directory, and what the control process starts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from helixflow.auth.bootstrap import ensure_bootstrap_key
from helixflow.auth.keys import KeyDirectory, KeyRecord
from helixflow.auth.revocations import RevocationFeed
from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.rpc.generated.auth_v1 import auth_pb2, auth_pb2_grpc
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.upgrade import upgrade

_Context = grpc.aio.ServicerContext[Any, Any]
SERVICE_NAME = auth_pb2.DESCRIPTOR.services_by_name["AuthService"].full_name
_HASH_BYTES = 32


class AuthService(auth_pb2_grpc.AuthServiceServicer):
    """The gRPC face of `KeyDirectory`. Errors are `HelixError`s; the server's interceptor renders them."""

    def __init__(self, directory: KeyDirectory, feed: RevocationFeed) -> None:
        self._directory = directory
        self._feed = feed
        # Revocations are published in the order of their revisions.
        self._revoking = asyncio.Lock()
        self._revocations: set[asyncio.Task[KeyRecord]] = set()

    async def ResolveKey(self, request: auth_pb2.ResolveKeyRequest, context: _Context) -> auth_pb2.ResolveKeyResponse:
        if len(request.key_hash) != _HASH_BYTES:
            raise HelixError(ErrorKind.INVALID_VALUE, "A key hash has 32 bytes.", param="key_hash")
        principal, expires_at = await self._directory.resolve(request.key_hash)
        return auth_pb2.ResolveKeyResponse(
            key_id=principal.key_id,
            key_name=principal.key_name,
            organisation_id=principal.organisation_id,
            project_id=principal.project_id,
            expires_at=expires_at,
        )

    async def WatchRevocations(
        self, request: auth_pb2.WatchRevocationsRequest, context: _Context
    ) -> AsyncIterator[auth_pb2.WatchRevocationsResponse]:
        async for revocation in self._feed.watch():
            yield auth_pb2.WatchRevocationsResponse(revision=revocation.revision, key_hash=revocation.key_hash)

    async def CreateKey(self, request: auth_pb2.CreateKeyRequest, context: _Context) -> auth_pb2.CreateKeyResponse:
        record, secret = await self._directory.create(request.name, request.expires_at)
        return auth_pb2.CreateKeyResponse(key=_to_proto(record), secret=secret)

    async def ListKeys(self, request: auth_pb2.ListKeysRequest, context: _Context) -> auth_pb2.ListKeysResponse:
        return auth_pb2.ListKeysResponse(keys=[_to_proto(record) for record in await self._directory.list_keys()])

    async def RevokeKey(self, request: auth_pb2.RevokeKeyRequest, context: _Context) -> auth_pb2.RevokeKeyResponse:
        # A client that hangs up must not keep a stored revocation from being told.
        task = asyncio.create_task(self._revoke(request.key_id), name="revocation")
        self._revocations.add(task)
        task.add_done_callback(self._revocations.discard)
        record = await asyncio.shield(task)
        return auth_pb2.RevokeKeyResponse(key=_to_proto(record))

    async def finish(self) -> None:
        """Waits for revocations under way, which the database bounds by its busy timeout."""
        await asyncio.gather(*self._revocations, return_exceptions=True)

    async def _revoke(self, key_id: str) -> KeyRecord:
        async with self._revoking:
            record, revocation = await self._directory.revoke(key_id)
            if revocation is not None:
                self._feed.publish(revocation)
        return record


class AuthServices:
    """Everything the auth service consists of in this process. Close it before the server stops."""

    def __init__(self, database: Database, service: AuthService, feed: RevocationFeed, bootstrap_key: str) -> None:
        self._database = database
        self._service = service
        self._feed = feed
        self.bootstrap_key = bootstrap_key

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to `server`, whose full name is `SERVICE_NAME`."""
        auth_pb2_grpc.add_AuthServiceServicer_to_server(self._service, server)

    async def close(self) -> None:
        """Ends all watches, which else never end, and closes the database. Idempotent."""
        self._feed.close()
        await self._service.finish()
        await self._database.close()


async def create_auth(settings: Settings, bootstrap_env: str | None, clock: Clock | None = None) -> AuthServices:
    """Opens and upgrades the database and makes sure of the bootstrap key. Raises `UserError` with one line."""
    clock = clock if clock is not None else SystemClock()
    database = await asyncio.to_thread(open_database, settings.data_dir)
    try:
        await upgrade(database.path)
        directory = KeyDirectory(database, clock)
        await directory.ensure_defaults()
        bootstrap_key = await ensure_bootstrap_key(directory, database, clock, settings.data_dir, bootstrap_env)
        feed = RevocationFeed(await directory.revision())
    except HelixError as exc:
        await database.close()
        raise UserError(f"{database.path}: {exc.message}", ExitCode.STORAGE) from exc
    except BaseException:
        await database.close()
        raise
    return AuthServices(database, AuthService(directory, feed), feed, bootstrap_key)


def _to_proto(record: KeyRecord) -> auth_pb2.Key:
    return auth_pb2.Key(
        key_id=record.key_id,
        name=record.name,
        hint=record.hint,
        created_at=record.created_at,
        expires_at=record.expires_at,
        revoked_at=record.revoked_at,
        bootstrap=record.bootstrap,
    )
