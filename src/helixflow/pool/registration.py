"""Which pools there are: they say so themselves, again and again, and gateways watch. In memory only."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import structlog

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.pool.broadcast import Broadcast
from helixflow.rpc.generated.pool_v1 import registry_pb2, registry_pb2_grpc

SERVICE_NAME: Final = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name
HEARTBEAT_S: Final = 2.0
SILENCE_S: Final = 8.0
# A pool whose stream broke comes back within it: its process is started again at once, which takes seconds on a busy
# machine, and its engines go on meanwhile.
GRACE_S: Final = 15.0
# Pools notice within a moment that the registry is back: what is not there by then has gone meanwhile.
SETTLE_S: Final = 10.0
MAX_POOLS: Final = 4096
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_ADDRESS: Final = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9a-fA-F:.]{2,45}\]):[0-9]{1,5}")
_TEXT: Final = re.compile(r"[!-~]{0,64}")

_Context = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger("helixflow.registry")


class Membership:
    """What one stream has registered. `ended` is set when a newer stream of the same pool has taken its place."""

    def __init__(self, pool: registry_pb2.Pool) -> None:
        self.pool = pool
        self.ended = asyncio.Event()


class Registry:
    """The pools of a fleet. `local` is that of the registry's own node, which needs no stream.

    `changes` tells of every change of `pools` or `is_complete`. Belongs to one event loop; `open` it there, and `close`
    it at the end, which ends all watches.
    """

    def __init__(self, local: registry_pb2.Pool | None = None) -> None:
        self.local = local
        self.changes = Broadcast()
        self.is_complete = False
        # Those who have said goodbye while the set is not complete.
        self.left: set[str] = set()
        self._members: dict[str, Membership] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._settling: asyncio.TimerHandle | None = None

    def open(self) -> None:
        self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self._settle)

    def close(self) -> None:
        for timer in (self._settling, *self._leaving.values()):
            if timer is not None:
                timer.cancel()
        self.changes.close()

    @property
    def pools(self) -> list[registry_pb2.Pool]:
        """All that are there now, the local one first."""
        local = [self.local] if self.local is not None else []
        return [*local, *(member.pool for member in self._members.values())]

    def set_local(self, pool: registry_pb2.Pool) -> None:
        """The pool of this node listens now."""
        self.local = pool
        self.changes.bump()

    def join(self, pool: registry_pb2.Pool) -> Membership:
        """Takes a pool in; of the same node it replaces what was registered before.

        Raises `HelixError`: CONFLICT when another node has the name, INVALID_VALUE, or OVERLOADED with too many.
        """
        _check(pool)
        present = self._members.get(pool.name)
        holder = self.local if self.local is not None and self.local.name == pool.name else None
        if present is not None and pool.name not in self._leaving:
            holder = present.pool
        if holder is not None and holder.node_id != pool.node_id:
            raise HelixError(
                ErrorKind.CONFLICT,
                f"Another node has registered the pool {pool.name!r}; give this one another name (pool.name).",
                param="name",
            )
        if present is None and len(self._members) >= MAX_POOLS:
            raise HelixError(ErrorKind.OVERLOADED, f"There are {MAX_POOLS} pools already.", retry_after_s=60)
        membership = Membership(pool)
        if holder is not None and holder is self.local:
            return membership  # this node's own: it is in the set anyway
        if (timer := self._leaving.pop(pool.name, None)) is not None:
            timer.cancel()
        if present is not None:
            present.ended.set()
        self._members[pool.name] = membership
        self.left.discard(pool.name)
        if present is None or present.pool != pool:
            log.info("pool.registered", pool=pool.name, address=pool.address, data_address=pool.data_address)
            self.changes.bump()
        return membership

    def change(self, membership: Membership, pool: registry_pb2.Pool) -> None:
        """The pool says something else of itself; its name and node stay. Raises `HelixError` (INVALID_VALUE)."""
        _check(pool)
        if (pool.name, pool.node_id) != (membership.pool.name, membership.pool.node_id):
            raise HelixError(ErrorKind.INVALID_VALUE, "A pool keeps its name and node while it is registered.")
        if pool != membership.pool:
            membership.pool = pool
            self.changes.bump()

    def leave(self, membership: Membership, *, for_good: bool) -> None:
        """A stream has ended: `for_good` if the pool has said so, else it may come back within the grace."""
        name = membership.pool.name
        if self._members.get(name) is not membership:
            return
        if for_good:
            if not self.is_complete:
                self.left.add(name)
            self._remove(name)
        else:
            self._leaving[name] = asyncio.get_running_loop().call_later(GRACE_S, self._remove, name)

    def _remove(self, name: str) -> None:
        self._leaving.pop(name, None)
        del self._members[name]
        log.info("pool.gone", pool=name)
        self.changes.bump()

    def _settle(self) -> None:
        self.is_complete = True
        self.left.clear()
        self.changes.bump()


class RegistryService(registry_pb2_grpc.RegistryServiceServicer):
    """The gRPC face of `Registry`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def register(self, server: grpc.aio.Server) -> None:
        """Adds it to `server`, as `SERVICE_NAME`."""
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(self, server)

    async def Register(
        self, request_iterator: AsyncIterator[registry_pb2.RegisterRequest], context: _Context
    ) -> AsyncIterator[registry_pb2.RegisterResponse]:
        first = await _next(request_iterator)
        if first is None:
            raise HelixError(ErrorKind.INVALID_REQUEST, "The first message names the pool.")
        membership = self._registry.join(first.pool)
        leaving = False
        try:
            yield registry_pb2.RegisterResponse(heartbeat_s=HEARTBEAT_S, silence_s=SILENCE_S)
            while not leaving and (message := await _next(request_iterator)) is not None:
                leaving = message.leaving
                if membership.ended.is_set():
                    raise HelixError(ErrorKind.CONFLICT, "A newer stream speaks for this pool.")
                if message.HasField("pool"):
                    self._registry.change(membership, message.pool)
        finally:
            self._registry.leave(membership, for_good=leaving)

    async def WatchPools(
        self, request: registry_pb2.WatchPoolsRequest, context: _Context
    ) -> AsyncIterator[registry_pb2.WatchPoolsResponse]:
        registry = self._registry
        while not registry.changes.is_closed:
            seen = registry.changes.revision
            yield registry_pb2.WatchPoolsResponse(
                pools=registry.pools,
                complete=registry.is_complete,
                local=registry.local.name if registry.local is not None else "",
                left=registry.left,
            )
            await registry.changes.wait_beyond(seen)


async def _next(messages: AsyncIterator[registry_pb2.RegisterRequest]) -> registry_pb2.RegisterRequest | None:
    """The next message; None once the pool sends no more. Raises `HelixError` (DEADLINE) after too long a silence."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await anext(aiter(messages), None)
    except TimeoutError as exc:
        raise HelixError(ErrorKind.DEADLINE, "The pool has been silent for too long.") from exc


def _check(pool: registry_pb2.Pool) -> None:
    if _NAME.fullmatch(pool.name) is None:
        raise HelixError(ErrorKind.INVALID_VALUE, "That is no name of a pool.", param="name")
    for param, address in (("address", pool.address), ("data_address", pool.data_address)):
        if address and _ADDRESS.fullmatch(address) is None:
            raise HelixError(ErrorKind.INVALID_VALUE, f"'{param}' is host:port.", param=param)
    for param, text in (("node_id", pool.node_id), ("version", pool.version)):
        if _TEXT.fullmatch(text) is None:
            raise HelixError(ErrorKind.INVALID_VALUE, f"'{param}' is not a short text.", param=param)
