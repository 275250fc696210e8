"""The gateway's cache of identities, and the administration of keys."""

import asyncio
import math
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc
import structlog

from helixflow.clients.watching import Watch
from helixflow.core.call import Principal
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import auth_pb2, auth_pb2_grpc

RESOLVE_TIMEOUT_S: Final = 2.0
ADMIN_TIMEOUT_S: Final = 10.0
NEGATIVE_TTL_S: Final = 5.0
MAX_NEGATIVE: Final = 10_000
# A stale entry in use is looked up again this often while auth is away.
RETRY_S: Final = 5.0
# Well-formed keys can be made up: what they cost at once is bounded.
MAX_LOOKUPS: Final = 1024
_ATTEMPTS: Final = 3

_INVALID: Final = "The API key is not valid: it is unknown, expired or revoked. Create one with: helixflow keys create"

Answer = TypeVar("Answer")

log = structlog.get_logger("helixflow.clients")


@dataclass(slots=True)
class _Entry:
    """An identity. `fresh_until` and `confirmed_at` are monotonic seconds, `expires_at` is since the epoch (or inf)."""

    principal: Principal
    fresh_until: float
    confirmed_at: float
    expires_at: float


class KeyResolver:
    """Identities by the hash of the key: at most `size` kept, each asked for again after `ttl_s`.

    While auth cannot be reached, an entry works for `grace_s` from the moment that it was last known to be good: from
    its look-up, or while the watch on revocations stood. What is not known is then refused as UNAVAILABLE.
    """

    def __init__(self, channel: grpc.aio.Channel, *, size: int, ttl_s: float, grace_s: float, clock: Clock) -> None:
        self._stub = auth_pb2_grpc.AuthServiceStub(channel)
        self._size = size
        self._ttl_s = ttl_s
        self._grace_s = grace_s
        self._clock = clock
        self._monotonic = clock.monotonic
        # Ordered by confirmation: the oldest goes first. What is in use is confirmed every `ttl_s`.
        self._entries: dict[bytes, _Entry] = {}
        self._unknown: dict[bytes, float] = {}
        self._lookups: dict[bytes, asyncio.Task[Principal]] = {}
        self._revision: int | None = None
        # Counts what made answers under way doubtful.
        self._invalidations = 0
        self._watching = False
        self._watched_until = -math.inf
        self._failing_since: float | None = None

    @property
    def has_watched(self) -> bool:
        """Whether revocations have been followed at least once: what was looked up before then is not kept."""
        return self._revision is not None

    def cached(self, key_hash: bytes) -> Principal | None:
        """The identity if it is known and fresh; never waits."""
        entry = self._entries.get(key_hash)
        if entry is not None and self._monotonic() < entry.fresh_until:
            return entry.principal
        return None

    async def resolve(self, key_hash: bytes) -> Principal:
        """The identity, asked for if need be; callers with the same key share one question.

        Raises `HelixError`: INVALID_API_KEY, UNAVAILABLE when auth cannot say and nothing usable is kept, or
        OVERLOADED while too many other keys are being asked for.
        """
        if (principal := self.cached(key_hash)) is not None:
            return principal
        if (until := self._unknown.get(key_hash)) is not None:
            if self._monotonic() < until:
                raise HelixError(ErrorKind.INVALID_API_KEY, _INVALID)
            del self._unknown[key_hash]
        task = self._lookups.get(key_hash)
        if task is None:
            if len(self._lookups) >= MAX_LOOKUPS:
                raise HelixError(
                    ErrorKind.OVERLOADED, "Too many API keys are being checked. Try again.", retry_after_s=1
                )
            task = asyncio.create_task(self._look_up(key_hash), name="key look-up")
            self._lookups[key_hash] = task
            task.add_done_callback(lambda done: self._finish(key_hash, done))
        try:
            # A caller that goes away must not take the answer from the others.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise _unavailable() from None
            raise

    async def run(self) -> None:
        """Watches revocations until cancelled; look-ups under way are then cancelled too."""
        watch = Watch("revocations", self._open_watch, self._on_revocation, self._on_watch_lost)
        try:
            await watch.run()
        finally:
            lookups = list(self._lookups.values())
            for task in lookups:
                task.cancel()
            await asyncio.gather(*lookups, return_exceptions=True)

    def _finish(self, key_hash: bytes, task: asyncio.Task[Principal]) -> None:
        del self._lookups[key_hash]
        if not task.cancelled():
            # Marks the exception as seen: all callers may have gone away.
            task.exception()

    async def _look_up(self, key_hash: bytes) -> Principal:
        request = auth_pb2.ResolveKeyRequest(key_hash=key_hash)
        for _ in range(_ATTEMPTS):
            invalidations = self._invalidations
            try:
                answer = await self._stub.ResolveKey(request, timeout=RESOLVE_TIMEOUT_S)
            except grpc.RpcError as exc:
                return self._without_answer(key_hash, from_rpc_error(exc), exc)
            self._failing_since = None
            # A revocation that came while the answer was under way may be of this very key: ask again.
            if invalidations == self._invalidations:
                return self._keep(key_hash, answer)
        raise _unavailable()

    def _keep(self, key_hash: bytes, answer: auth_pb2.ResolveKeyResponse) -> Principal:
        principal = Principal(answer.key_id, answer.key_name, answer.organisation_id, answer.project_id)
        now = self._monotonic()
        expires_at = float(answer.expires_at) if answer.expires_at else math.inf
        fresh_until = min(now + self._ttl_s, now + expires_at - self._clock.now())
        if fresh_until <= now:
            self._entries.pop(key_hash, None)
            raise HelixError(ErrorKind.INVALID_API_KEY, _INVALID)
        self._entries.pop(key_hash, None)
        while len(self._entries) >= self._size:
            del self._entries[next(iter(self._entries))]
        self._entries[key_hash] = _Entry(principal, fresh_until, now, expires_at)
        return principal

    def _without_answer(self, key_hash: bytes, error: HelixError, cause: grpc.RpcError) -> Principal:
        now = self._monotonic()
        if error.kind in (ErrorKind.NOT_FOUND, ErrorKind.INVALID_API_KEY):
            self._failing_since = None
            self._entries.pop(key_hash, None)
            while len(self._unknown) >= MAX_NEGATIVE:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[key_hash] = now + NEGATIVE_TTL_S
            raise HelixError(ErrorKind.INVALID_API_KEY, _INVALID) from cause
        if self._failing_since is None:
            self._failing_since = now
            log.warning("auth.unreachable", code=error.code)
        entry = self._entries.get(key_hash)
        if entry is None:
            raise _unavailable() from cause
        valid_s = entry.expires_at - self._clock.now()
        if valid_s <= 0:
            raise HelixError(ErrorKind.INVALID_API_KEY, _INVALID) from cause
        left_s = min(self._vouched_until(entry) + self._grace_s - now, valid_s)
        if left_s <= 0:
            del self._entries[key_hash]
            raise _unavailable() from cause
        entry.fresh_until = now + min(left_s, RETRY_S)
        return entry.principal

    def _vouched_until(self, entry: _Entry) -> float:
        """When the entry was last known to be good. While the watch stands a revocation would have been seen, unless
        auth hangs: then nothing is vouched for from the first look-up that failed.
        """
        watched_until = self._watched_until
        if self._watching:
            watched_until = self._monotonic() if self._failing_since is None else self._failing_since
        return max(entry.confirmed_at, watched_until)

    def _open_watch(self, timeout_s: float) -> object:
        return self._stub.WatchRevocations(auth_pb2.WatchRevocationsRequest(), timeout=timeout_s)

    def _on_revocation(self, message: auth_pb2.WatchRevocationsResponse, first: bool) -> None:
        if first:
            if message.revision != self._revision:
                self._forget_all()
            self._watching = True
            self._failing_since = None
        elif self._revision is None or message.revision != self._revision + 1:
            self._forget_all()
        else:
            self._invalidations += 1
            self._entries.pop(message.key_hash, None)
        self._revision = message.revision

    def _on_watch_lost(self) -> None:
        self._watching = False
        self._watched_until = self._monotonic() if self._failing_since is None else self._failing_since

    def _forget_all(self) -> None:
        self._invalidations += 1
        self._entries.clear()
        self._unknown.clear()


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as it may be shown. Times are seconds since the epoch; 0: does not expire, is not revoked."""

    key_id: str
    name: str
    hint: str
    created_at: int
    expires_at: int
    revoked_at: int
    bootstrap: bool


class KeyAdmin:
    """Creates, lists and revokes keys. All raise `HelixError`, UNAVAILABLE when no auth service runs."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = auth_pb2_grpc.AuthServiceStub(channel)

    async def create(self, name: str, expires_at: int = 0) -> tuple[KeyInfo, str]:
        """A new key and its secret, which cannot be had again. `expires_at`: seconds since the epoch, 0 for never."""
        request = auth_pb2.CreateKeyRequest(name=name, expires_at=expires_at)
        answer = await _answer(self._stub.CreateKey(request, timeout=ADMIN_TIMEOUT_S))
        return _info(answer.key), answer.secret

    async def list_keys(self) -> list[KeyInfo]:
        """All keys, newest first, revoked and expired ones too."""
        answer = await _answer(self._stub.ListKeys(auth_pb2.ListKeysRequest(), timeout=ADMIN_TIMEOUT_S))
        return [_info(key) for key in answer.keys]

    async def revoke(self, key_id: str) -> KeyInfo:
        """Revokes for good; a second time is no error. NOT_FOUND for an unknown id."""
        request = auth_pb2.RevokeKeyRequest(key_id=key_id)
        return _info((await _answer(self._stub.RevokeKey(request, timeout=ADMIN_TIMEOUT_S))).key)


async def _answer(call: Awaitable[Answer]) -> Answer:
    try:
        return await call
    except grpc.RpcError as exc:
        raise from_rpc_error(exc) from exc


def _info(key: auth_pb2.Key) -> KeyInfo:
    return KeyInfo(key.key_id, key.name, key.hint, key.created_at, key.expires_at, key.revoked_at, key.bootstrap)


def _unavailable() -> HelixError:
    message = "The API key cannot be checked now: the auth service does not answer. Try again."
    return HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=1)
