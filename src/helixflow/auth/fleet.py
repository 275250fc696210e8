"""Administration of pools: asked of the pools themselves, with the caller's permission and a record of it."""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, Protocol

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.dispatch import Conversation, Invocation
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import fleet_pb2 as pb

MAX_REPLICAS: Final = 64
_TARGET: Final = "deployment"


class Pools(Protocol):
    """The pools that are known now. Those that take a pool's name raise `HelixError`: NOT_FOUND for an unknown pool or
    deployment, UNAVAILABLE when the pool does not answer, and what it refuses with.
    """

    async def describe(self) -> Sequence[pb.Pool]:
        """All of them, by name; one that does not answer is not `reachable`."""
        ...

    async def load(self, pool: str, deployment: str) -> None: ...

    async def unload(self, pool: str, deployment: str) -> None: ...

    async def pin(self, pool: str, deployment: str, *, pinned: bool) -> None: ...

    async def scale(self, pool: str, deployment: str, replicas: int) -> None: ...

    async def drain(self, pool: str, *, resume: bool) -> None: ...


class NoPools:
    """Implements `Pools` where none can be known."""

    async def describe(self) -> Sequence[pb.Pool]:
        return ()

    async def load(self, pool: str, deployment: str) -> None:
        raise _unknown(pool)

    async def unload(self, pool: str, deployment: str) -> None:
        raise _unknown(pool)

    async def pin(self, pool: str, deployment: str, *, pinned: bool) -> None:
        raise _unknown(pool)

    async def scale(self, pool: str, deployment: str, replicas: int) -> None:
        raise _unknown(pool)

    async def drain(self, pool: str, *, resume: bool) -> None:
        raise _unknown(pool)


class Fleet:
    """The operations of FleetService. None of them holds a transaction while a pool works."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def operations(self) -> Mapping[str, Conversation]:
        return {
            "ListPools": self._list,
            "LoadModel": self._load,
            "UnloadModel": self._unload,
            "PinModel": self._pin,
            "ScaleModel": self._scale,
            "DrainPool": self._drain,
        }

    async def _list(self, invocation: Invocation, request: pb.ListPoolsRequest) -> pb.ListPoolsResponse:
        return pb.ListPoolsResponse(pools=await self._pools.describe())

    async def _load(self, invocation: Invocation, request: pb.PoolDeploymentRequest) -> pb.FleetResponse:
        ask = self._pools.load(request.pool, request.deployment)
        return await _recorded(invocation, request.deployment, {"pool": request.pool}, ask)

    async def _unload(self, invocation: Invocation, request: pb.PoolDeploymentRequest) -> pb.FleetResponse:
        ask = self._pools.unload(request.pool, request.deployment)
        return await _recorded(invocation, request.deployment, {"pool": request.pool}, ask)

    async def _pin(self, invocation: Invocation, request: pb.PinPoolModelRequest) -> pb.FleetResponse:
        ask = self._pools.pin(request.pool, request.deployment, pinned=request.pinned)
        after = {"pool": request.pool, "pinned": request.pinned}
        return await _recorded(invocation, request.deployment, after, ask)

    async def _scale(self, invocation: Invocation, request: pb.ScalePoolModelRequest) -> pb.FleetResponse:
        if request.replicas > MAX_REPLICAS:
            message = f"A deployment has 0 to {MAX_REPLICAS} replicas on a pool."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param="replicas")
        ask = self._pools.scale(request.pool, request.deployment, request.replicas)
        after = {"pool": request.pool, "replicas": request.replicas}
        return await _recorded(invocation, request.deployment, after, ask)

    async def _drain(self, invocation: Invocation, request: pb.DrainPoolRequest) -> pb.FleetResponse:
        ask = self._pools.drain(request.pool, resume=request.resume)
        return await _recorded(invocation, request.pool, {"draining": not request.resume}, ask, kind="pool")


async def _recorded(
    invocation: Invocation, target: str, after: dict[str, Any], ask: Awaitable[None], *, kind: str = _TARGET
) -> pb.FleetResponse:
    """Done first, recorded then: what a pool refused did not happen."""
    await ask
    async with invocation.writing() as unit:
        unit.record(kind, target, after=after, organisation_id=INSTALLATION)
    return pb.FleetResponse()


def _unknown(pool: str) -> HelixError:
    return HelixError(ErrorKind.NOT_FOUND, f"There is no pool {pool!r}.", param="pool")
