"""Limits and budgets by principal: a cache in front of the auth service, which tells what changes."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from helixflow.clients.changes import ChangeWatch
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal
from helixflow.metering.policies import Policies
from helixflow.metering.policy_answers import PolicyAnswers, policy_request
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import identity_pb2, metering_pb2, metering_pb2_grpc

RESOLVE_TIMEOUT_S: Final = 2.0
# Without a watch, what is known is asked for again this often.
RETRY_S: Final = 5.0
# Callers that come all at once, after a change: what they cost is bounded.
MAX_LOOKUPS: Final = 1024
_ATTEMPTS: Final = 3

# A key's id says all. An account is somebody else in each of its projects, and without one in each organisation.
_Key = tuple[str, str]


@dataclass(slots=True)
class _Entry:
    """`by_model` and `otherwise` as in `Applying`, at hand; `confirmed_at` and `fresh_until` are monotonic seconds.

    `fresh_until` counts only while no watch stands: with one, what changes is told.
    """

    by_model: Mapping[str, Policies]
    otherwise: Policies
    organisation_id: str
    confirmed_at: float
    fresh_until: float


@dataclass(slots=True)
class _Lookup:
    """A question under way; `doubtful` once something changed that the answer may have missed."""

    organisation_id: str
    task: asyncio.Task[_Entry]
    doubtful: bool = False


class PolicyCache:
    """Policies of at most `size` principals, those confirmed longest ago go first. Implements `Follower`.

    While `watch` stands an entry holds until a POLICIES change of its organisation or of the installation. Without it,
    an entry is asked for again every few seconds, and while auth cannot be reached works for `grace_s` from when it was
    last known to be good. Who is not known is then refused: nothing is admitted unlimited. `close` it in the end.
    """

    def __init__(
        self, channel: grpc.aio.Channel, watch: ChangeWatch, *, size: int, grace_s: float, clock: Clock
    ) -> None:
        self._stub = metering_pb2_grpc.MeteringServiceStub(channel)
        self._watch = watch
        self._size = size
        self._answers = PolicyAnswers(size)
        self._grace_s = grace_s
        self._monotonic = clock.monotonic
        self._entries: dict[_Key, _Entry] = {}
        # One of 100,000 that changes must not cost a look at all of them.
        self._of_organisation: dict[str, dict[_Key, None]] = {}
        self._lookups: dict[_Key, _Lookup] = {}
        watch.follow(self)

    def __len__(self) -> int:
        """How many principals are known."""
        return len(self._entries)

    def cached(self, principal: Principal, model: str) -> Policies | None:
        """What calls of that model must fit, if that is known and fresh; never waits."""
        entry = self._entries.get((principal.id, principal.project_id or principal.organisation_id))
        if entry is None:
            return None
        vouched_until = self._watch.vouched_until
        # Infinite while the watch stands: then the clock, a quarter of all this, is not looked at.
        if vouched_until != math.inf and self._monotonic() >= max(entry.fresh_until, vouched_until + RETRY_S):
            return None
        return entry.by_model.get(model, entry.otherwise)

    async def resolve(self, principal: Principal, model: str) -> Policies:
        """The same, asked for if need be; callers who are the same principal share one question.

        Raises `HelixError`: UNAVAILABLE when auth cannot say and nothing usable is kept, OVERLOADED while too many
        other principals are being asked for.
        """
        if (policies := self.cached(principal, model)) is not None:
            return policies
        key = (principal.id, principal.project_id or principal.organisation_id)
        lookup = self._lookups.get(key)
        if lookup is None:
            if len(self._lookups) >= MAX_LOOKUPS:
                if (known := self._still_good(key)) is not None:
                    return known.by_model.get(model, known.otherwise)
                raise HelixError(
                    ErrorKind.OVERLOADED, "Too many callers' limits are being read. Try again.", retry_after_s=1
                )
            task = asyncio.create_task(self._look_up(key, principal), name="policy look-up")
            lookup = self._lookups[key] = _Lookup(principal.organisation_id, task)
            task.add_done_callback(lambda done: self._finish(key, done))
        try:
            # A caller that goes away must not take the answer from the others.
            entry = await asyncio.shield(lookup.task)
        except asyncio.CancelledError:
            if lookup.task.cancelled():
                raise _unavailable() from None
            raise
        return entry.by_model.get(model, entry.otherwise)

    async def close(self) -> None:
        """Cancels look-ups under way; who waits for one gets UNAVAILABLE."""
        tasks = [lookup.task for lookup in self._lookups.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self) -> None:
        self._entries.clear()
        self._of_organisation.clear()
        for lookup in self._lookups.values():
            lookup.doubtful = True

    def begin(self, changes: Sequence[identity_pb2.Change]) -> None:
        """Says nothing about policies: what changed unseen has been forgotten."""

    def apply(self, change: identity_pb2.Change) -> None:
        if change.kind != identity_pb2.CHANGE_KIND_POLICIES:
            return
        organisation_id = change.subject_id
        if not organisation_id:
            self.forget()
            return
        for key in self._of_organisation.pop(organisation_id, ()):
            del self._entries[key]
        for lookup in self._lookups.values():
            if lookup.organisation_id == organisation_id:
                lookup.doubtful = True

    def trust(self, watch: ChangeWatch) -> None:
        """Policies are not signed."""

    def _finish(self, key: _Key, task: asyncio.Task[_Entry]) -> None:
        del self._lookups[key]
        if not task.cancelled():
            # Marks the exception as seen: all callers may have gone away.
            task.exception()

    async def _look_up(self, key: _Key, principal: Principal) -> _Entry:
        request = policy_request(principal)
        lookup = self._lookups[key]
        for _ in range(_ATTEMPTS):
            lookup.doubtful = False
            try:
                answer = await self._stub.ResolvePolicies(request, timeout=RESOLVE_TIMEOUT_S)
            except grpc.RpcError as exc:
                return self._without_answer(key, from_rpc_error(exc), exc)
            self._watch.believe()
            # A change that came while the answer was under way may not be in it: ask again.
            if not lookup.doubtful:
                return self._keep(key, principal.organisation_id, answer)
        raise _unavailable()

    def _keep(self, key: _Key, organisation_id: str, answer: metering_pb2.ResolvePoliciesResponse) -> _Entry:
        applying = self._answers.read(answer, organisation_id)
        now = self._monotonic()
        entry = _Entry(applying.by_model, applying.otherwise, organisation_id, now, now + RETRY_S)
        self._drop(key)
        while len(self._entries) >= self._size:
            self._drop(next(iter(self._entries)))
        self._entries[key] = entry
        self._of_organisation.setdefault(organisation_id, {})[key] = None
        return entry

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        keys = self._of_organisation[entry.organisation_id]
        del keys[key]
        if not keys:
            del self._of_organisation[entry.organisation_id]

    def _without_answer(self, key: _Key, error: HelixError, cause: grpc.RpcError) -> _Entry:
        self._watch.doubt(error.code)
        entry = self._still_good(key)
        if entry is None:
            self._drop(key)
            raise _unavailable() from cause
        return entry

    def _still_good(self, key: _Key) -> _Entry | None:
        """What is known, if its grace is not over; from then on fresh for a while, within the grace."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = self._monotonic()
        left_s = max(entry.confirmed_at, min(self._watch.vouched_until, now)) + self._grace_s - now
        if left_s <= 0:
            return None
        entry.fresh_until = now + min(left_s, RETRY_S)
        return entry


def _unavailable() -> HelixError:
    message = "The limits of this caller cannot be read now: the auth service does not answer. Try again."
    return HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=1)
