"""IdentityService of proto/helixflow/auth/v1: what gateways ask, and what they are told."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final

import grpc

from helixflow.auth.authentication import find_key, held_by_key
from helixflow.auth.changes import ChangeFeed, News
from helixflow.auth.grants import parse_scopes
from helixflow.auth.lookups import Lookups
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import INSTALLATION_PERMISSIONS, OPERATOR_SCOPES
from helixflow.rpc.generated.auth_v1 import identity_pb2 as pb
from helixflow.rpc.generated.auth_v1 import identity_pb2_grpc
from helixflow.settings.tree import AuthSettings
from helixflow.storage.engine import Database

_Context = grpc.aio.ServicerContext[Any, Any]
# The public keys that tokens may be signed with now.
ReadSigningKeys = Callable[[], Awaitable[Sequence[pb.SigningKey]]]
_HASH_BYTES: Final = 32


class IdentityService(identity_pb2_grpc.IdentityServiceServicer):
    """Answers out of the database, always as it is now. Errors are `HelixError`s; the interceptor renders them."""

    def __init__(
        self,
        database: Database,
        feed: ChangeFeed,
        clock: Clock,
        read_signing_keys: ReadSigningKeys,
        settings: AuthSettings,
    ) -> None:
        # Gateways wait. What changes between two look-ups is told as a change.
        self._lookups = Lookups(database)
        self._feed = feed
        self._clock = clock
        self._read_signing_keys = read_signing_keys
        self._settings = settings

    async def ResolveKey(self, request: pb.ResolveKeyRequest, context: _Context) -> pb.ResolveKeyResponse:
        if len(request.key_hash) != _HASH_BYTES:
            raise HelixError(ErrorKind.INVALID_VALUE, "A key hash has 32 bytes.", param="key_hash")
        row = await find_key(self._lookups, request.key_hash)
        held = await held_by_key(self._lookups, row, self._clock.now()) if row is not None else None
        if row is None or held is None:
            raise HelixError(ErrorKind.NOT_FOUND, "There is no valid key with this hash.")
        permissions = held.grants.within(row.project_id)
        # No role holds these: they are the key's own.
        permissions |= INSTALLATION_PERMISSIONS if row.bootstrap else parse_scopes(row.scopes) & OPERATOR_SCOPES
        return pb.ResolveKeyResponse(
            key_id=row.id,
            key_name=row.name,
            organisation_id=row.organisation_id,
            project_id=row.project_id,
            expires_at=row.expires_at or 0,
            owner_id=row.owner_id,
            permissions=sorted(permissions),
            models=row.models,
            networks=row.networks,
            # What was allowed when it was given may not be so any more.
            priority=min(row.priority, row.organisation_max_priority),
            weight=row.weight,
            organisation_weight=row.organisation_share_weight,
            residency=row.organisation_residency,
        )

    async def WatchChanges(
        self, request: pb.WatchChangesRequest, context: _Context
    ) -> AsyncIterator[pb.WatchChangesResponse]:
        async with aclosing(self._feed.watch()) as watch:
            async for news in watch:
                yield await self._to_message(news)

    async def _to_message(self, news: News) -> pb.WatchChangesResponse:
        message = pb.WatchChangesResponse(revision=news.revision, changes=news.changes, more=news.more)
        if news.snapshot and not news.more:
            message.issuer = self._settings.issuer
            message.audience = self._settings.audience
        if not news.more and (news.snapshot or news.changes[0].kind == pb.CHANGE_KIND_SIGNING_KEYS):
            message.signing_keys.extend(await self._read_signing_keys())
        return message
