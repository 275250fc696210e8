"""Identities by API key: a cache in front of the auth service."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from helixflow.clients.belonging import Belonging
from helixflow.clients.changes import ChangeWatch
from helixflow.clients.principals import principal_of_key
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import identity_pb2, identity_pb2_grpc

RESOLVE_TIMEOUT_S: Final = 2.0
NEGATIVE_TTL_S: Final = 5.0
MAX_NEGATIVE: Final = 10_000
# A stale entry in use is looked up again this often while auth is away.
RETRY_S: Final = 5.0
# Well-formed keys can be made up: what they cost at once is bounded.
MAX_LOOKUPS: Final = 1024
_ATTEMPTS: Final = 3

_INVALID: Final = "The API key is not valid: it is unknown, expired or revoked. Create one with: helixflow keys create"


@dataclass(slots=True)
class _Entry:
    """An identity. `fresh_until` and `confirmed_at` are monotonic seconds, `expires_at` is since the epoch (or inf)."""

    principal: Principal
    fresh_until: float
    confirmed_at: float
    expires_at: float


class KeyResolver:
    """Identities by the hash of the key: at most `size` kept, each asked for again after `ttl_s`.

    Follows `watch`: what changes is forgotten at once. While auth cannot be reached, an entry works for `grace_s` from
    the moment that it was last known to be good: from its look-up, or while the watch vouched for it. What is not known
    is then refused as UNAVAILABLE. `close` it in the end.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        watch: ChangeWatch,
        *,
        size: int,
        ttl_s: float,
        grace_s: float,
        clock: Clock,
    ) -> None:
        self._stub = identity_pb2_grpc.IdentityServiceStub(channel)
        self._watch = watch
        self._size = size
        self._ttl_s = ttl_s
        self._grace_s = grace_s
        self._clock = clock
        self._monotonic = clock.monotonic
        # Ordered by confirmation: the oldest goes first. What is in use is confirmed every `ttl_s`.
        self._entries: dict[bytes, _Entry] = {}
        self._unknown: dict[bytes, float] = {}
        self._lookups: dict[bytes, asyncio.Task[Principal]] = {}
        # One of 100,000 that changes must not cost a look at all of them: 10 ms of the event loop.
        self._of_owner, self._of_project, self._of_organisation = Belonging(), Belonging(), Belonging()
        # Counts what made all answers under way doubtful; of single keys only the answer for that key is.
        self._invalidations = 0
        self._doubtful: set[bytes] = set()
        watch.follow(self)

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

    async def close(self) -> None:
        """Cancels look-ups under way; who waits for one gets UNAVAILABLE."""
        lookups = list(self._lookups.values())
        for task in lookups:
            task.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)

    def forget(self) -> None:
        self._invalidations += 1
        self._entries.clear()
        self._unknown.clear()
        for belonging in (self._of_owner, self._of_project, self._of_organisation):
            belonging.clear()

    def begin(self, changes: Sequence[identity_pb2.Change]) -> None:
        """Says nothing about keys: those changed since are forgotten, or none has changed."""

    def apply(self, change: identity_pb2.Change) -> None:
        match change.kind:
            case identity_pb2.CHANGE_KIND_KEY:
                self._drop(change.key_hash)
                self._unknown.pop(change.key_hash, None)
                if change.key_hash in self._lookups:
                    self._doubtful.add(change.key_hash)
            case identity_pb2.CHANGE_KIND_OWNER:
                self._drop_all(self._of_owner, change.subject_id)
            case identity_pb2.CHANGE_KIND_PROJECT:
                self._drop_all(self._of_project, change.subject_id)
            case identity_pb2.CHANGE_KIND_ORGANISATION:
                self._drop_all(self._of_organisation, change.subject_id)

    def trust(self, watch: ChangeWatch) -> None:
        """Keys are not signed."""

    def _drop_all(self, belonging: Belonging, subject: str) -> None:
        self._invalidations += 1
        keys = belonging.take(subject)
        if len(keys) == len(self._entries):
            # As where there is one organisation: 100,000 in 40 ms, one by one in 200.
            self.forget()
            return
        for key_hash in keys:
            self._drop(key_hash)
        # Whose these are is not known, and a key may have become valid: its owner was reinstated.
        self._unknown.clear()

    def _drop(self, key_hash: bytes) -> None:
        entry = self._entries.pop(key_hash, None)
        if entry is not None:
            self._of_owner.discard(entry.principal.owner_id, key_hash)
            self._of_project.discard(entry.principal.project_id, key_hash)
            self._of_organisation.discard(entry.principal.organisation_id, key_hash)

    def _add(self, key_hash: bytes, entry: _Entry) -> None:
        """As the one confirmed last."""
        self._drop(key_hash)
        while len(self._entries) >= self._size:
            self._drop(next(iter(self._entries)))
        self._entries[key_hash] = entry
        self._of_owner.add(entry.principal.owner_id, key_hash)
        self._of_project.add(entry.principal.project_id, key_hash)
        self._of_organisation.add(entry.principal.organisation_id, key_hash)

    def _finish(self, key_hash: bytes, task: asyncio.Task[Principal]) -> None:
        del self._lookups[key_hash]
        self._doubtful.discard(key_hash)
        if not task.cancelled():
            # Marks the exception as seen: all callers may have gone away.
            task.exception()

    async def _look_up(self, key_hash: bytes) -> Principal:
        request = identity_pb2.ResolveKeyRequest(key_hash=key_hash)
        for _ in range(_ATTEMPTS):
            self._doubtful.discard(key_hash)
            invalidations = self._invalidations
            try:
                answer = await self._stub.ResolveKey(request, timeout=RESOLVE_TIMEOUT_S)
            except grpc.RpcError as exc:
                error = from_rpc_error(exc)
                if error.kind is ErrorKind.NOT_FOUND and self._is_doubtful(key_hash, invalidations):
                    continue
                return self._without_answer(key_hash, error, exc)
            self._watch.believe()
            # A change that came while the answer was under way may be of this very key: ask again.
            if not self._is_doubtful(key_hash, invalidations):
                return self._keep(key_hash, answer)
        raise _unavailable()

    def _is_doubtful(self, key_hash: bytes, invalidations: int) -> bool:
        """Whether a question asked when there were so many `invalidations` may have been answered too early."""
        return invalidations != self._invalidations or key_hash in self._doubtful

    def _keep(self, key_hash: bytes, answer: identity_pb2.ResolveKeyResponse) -> Principal:
        principal = principal_of_key(answer)
        now = self._monotonic()
        expires_at = float(answer.expires_at) if answer.expires_at else math.inf
        fresh_until = min(now + self._ttl_s, now + expires_at - self._clock.now())
        if fresh_until <= now:
            self._drop(key_hash)
            raise HelixError(ErrorKind.INVALID_API_KEY, _INVALID)
        self._add(key_hash, _Entry(principal, fresh_until, now, expires_at))
        return principal

    def _without_answer(self, key_hash: bytes, error: HelixError, cause: grpc.RpcError) -> Principal:
        now = self._monotonic()
        if error.kind is ErrorKind.NOT_FOUND:
            self._watch.believe()
            self._drop(key_hash)
            while len(self._unknown) >= MAX_NEGATIVE:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[key_hash] = now + NEGATIVE_TTL_S
            raise HelixError(ErrorKind.INVALID_API_KEY, _INVALID) from cause
        self._watch.doubt(error.code)
        entry = self._entries.get(key_hash)
        if entry is None:
            raise _unavailable() from cause
        valid_s = entry.expires_at - self._clock.now()
        if valid_s <= 0:
            raise HelixError(ErrorKind.INVALID_API_KEY, _INVALID) from cause
        vouched_until = max(entry.confirmed_at, min(self._watch.vouched_until, now))
        left_s = min(vouched_until + self._grace_s - now, valid_s)
        if left_s <= 0:
            self._drop(key_hash)
            raise _unavailable() from cause
        entry.fresh_until = now + min(left_s, RETRY_S)
        return entry.principal


def _unavailable() -> HelixError:
    message = "The API key cannot be checked now: the auth service does not answer. Try again."
    return HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=1)
