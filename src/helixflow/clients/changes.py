"""The one watch that a process keeps on the directory of identities, and who is told what it says."""

import asyncio
import math
from collections.abc import Sequence
from typing import Final, Protocol

import grpc
import structlog

from helixflow.clients.watching import Watch
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import identity_pb2, identity_pb2_grpc

# A service that hangs keeps its stream open: now and then, and more often while in doubt, it is asked something.
PROBE_S: Final = 30.0
DOUBT_PROBE_S: Final = 5.0
PROBE_TIMEOUT_S: Final = 2.0
_NOBODYS_KEY: Final = bytes(32)
_KNOWN_KINDS: Final = frozenset(identity_pb2.ChangeKind.values()) - {identity_pb2.CHANGE_KIND_UNSPECIFIED}

log = structlog.get_logger("helixflow.clients")


class Follower(Protocol):
    """A cache that follows the directory. Called on the event loop; must not block or raise."""

    def forget(self) -> None:
        """Anything may have changed: what is cached counts no more."""
        ...

    def begin(self, changes: Sequence[identity_pb2.Change]) -> None:
        """A snapshot: all that voids tokens which may still be in use. Comes after `forget` where that is needed."""
        ...

    def apply(self, change: identity_pb2.Change) -> None:
        """One change, just made."""
        ...

    def trust(self, watch: "ChangeWatch") -> None:
        """`signing_keys`, `issuer` or `audience` of the watch may have changed."""
        ...


class ChangeWatch:
    """Follows the directory's changes and tells the followers, in the order of their coming.

    `vouched_until` is on the clock's monotonic scale: until then a change would have been seen; infinite while the
    watch stands. `signing_keys`, `issuer` and `audience` are what access tokens are verified by.
    """

    def __init__(self, channel: grpc.aio.Channel, *, clock: Clock) -> None:
        self._stub = identity_pb2_grpc.IdentityServiceStub(channel)
        self._monotonic = clock.monotonic
        self._followers: list[Follower] = []
        self._revision: int | None = None
        self._snapshot: list[identity_pb2.Change] = []
        self._standing = False
        self._failing_since: float | None = None
        self.has_watched = False
        self.vouched_until = -math.inf
        self.signing_keys: Sequence[identity_pb2.SigningKey] = ()
        self.issuer = ""
        self.audience = ""

    def follow(self, follower: Follower) -> None:
        self._followers.append(follower)

    async def run(self) -> None:
        """Watches until cancelled."""
        watch = Watch("changes", self._open, self._on_message, self._on_lost)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch.run(), name="watch of changes")
            tasks.create_task(self._probe(), name="probe of auth")

    def doubt(self, code: str) -> None:
        """The service did not answer: nothing is vouched for from now on, until it does."""
        if self._failing_since is None:
            self._failing_since = self._monotonic()
            self.vouched_until = min(self.vouched_until, self._failing_since)
            log.warning("auth.unreachable", code=code)

    def believe(self) -> None:
        """The service has answered."""
        self._failing_since = None
        if self._standing:
            self.vouched_until = math.inf

    def _open(self, timeout_s: float) -> object:
        self._snapshot = []
        return self._stub.WatchChanges(identity_pb2.WatchChangesRequest(), timeout=timeout_s)

    def _on_message(self, message: identity_pb2.WatchChangesResponse, _first: bool) -> None:
        if self._standing:
            self._on_change(message)
            return
        self._snapshot.extend(message.changes)
        if message.more:
            return
        changes, self._snapshot = self._snapshot, []
        if message.revision != self._revision:
            self._forget()
        self._revision = message.revision
        self._trust(message)
        for follower in self._followers:
            follower.begin(changes)
        self._standing = self.has_watched = True
        self.believe()

    def _on_change(self, message: identity_pb2.WatchChangesResponse) -> None:
        assert self._revision is not None
        if message.revision != self._revision + 1 or len(message.changes) != 1:
            # What was missed may be anything: until the next snapshot nothing is known.
            self._standing = False
            self._revision = None
            self.vouched_until = -math.inf
            self._forget()
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "Changes were missed: the watch begins anew.")
        self._revision = message.revision
        (change,) = message.changes
        if change.kind == identity_pb2.CHANGE_KIND_SIGNING_KEYS:
            self._trust(message)
        elif change.kind in _KNOWN_KINDS:
            for follower in self._followers:
                follower.apply(change)
        else:  # only a newer service knows what it means
            self._forget()

    def _on_lost(self) -> None:
        self._standing = False
        self.vouched_until = min(self.vouched_until, self._monotonic())

    def _trust(self, message: identity_pb2.WatchChangesResponse) -> None:
        self.signing_keys = tuple(message.signing_keys)
        if message.issuer:
            self.issuer, self.audience = message.issuer, message.audience
        for follower in self._followers:
            follower.trust(self)

    def _forget(self) -> None:
        for follower in self._followers:
            follower.forget()

    async def _probe(self) -> None:
        request = identity_pb2.ResolveKeyRequest(key_hash=_NOBODYS_KEY)
        while True:
            await asyncio.sleep(PROBE_S if self._failing_since is None else DOUBT_PROBE_S)
            if not self._standing:
                continue
            try:
                await self._stub.ResolveKey(request, timeout=PROBE_TIMEOUT_S)
            except grpc.RpcError as exc:
                error = from_rpc_error(exc)
                if error.kind is not ErrorKind.NOT_FOUND:
                    self.doubt(error.code)
                    continue
            self.believe()
