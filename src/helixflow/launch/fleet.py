"""Asks the pools of the registry, for administration."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.pki.identity import ServiceIdentity
from helixflow.pool.registration import Registry
from helixflow.rpc.channels import create_channel
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import fleet_pb2 as pb
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc, registry_pb2
from helixflow.rpc.sockets import socket_path

_DESCRIBE_S: Final = 2.0
_CHANGE_S: Final = 8.0
# Refusing a load takes a look at the model's file, which may have to be hashed.
_WATCH_S: Final = 5.0
_UNLOAD_GRACE_S: Final = 60.0
_STATE_PREFIX: Final = "DEPLOYMENT_STATE_"
# The pool answers at once; what runs goes on for as long as it needs.
_DRAIN_MS: Final = 1


class FleetPools:
    """Implements `auth.fleet.Pools` over a registry. Keeps a channel a pool; `close` ends them.

    `watch_s`: how long a load or an end is waited for, so that a refusal is told to whoever asked.
    """

    def __init__(
        self, registry: Registry, identity: ServiceIdentity, run_dir: Path, *, watch_s: float = _WATCH_S
    ) -> None:
        self._registry = registry
        self._identity = identity
        self._run_dir = run_dir
        self._watch_s = watch_s
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def describe(self) -> Sequence[pb.Pool]:
        pools = sorted(self._registry.pools, key=lambda pool: pool.name)
        described = await asyncio.gather(*(self._describe(pool) for pool in pools))
        await self._forget({self._target(pool) for pool in pools})
        return described

    async def load(self, pool: str, deployment: str) -> None:
        """Returns once it serves, or is still loading after `watch_s`."""
        request = pool_pb2.LoadModelRequest(deployment=deployment, wait=True)
        await self._begin(pool, lambda stub: stub.LoadModel(request, timeout=self._watch_s))

    async def unload(self, pool: str, deployment: str) -> None:
        """Returns once its engines have ended, or still work at something after `watch_s`."""
        request = pool_pb2.UnloadModelRequest(deployment=deployment, grace_s=_UNLOAD_GRACE_S)
        await self._begin(pool, lambda stub: stub.UnloadModel(request, timeout=self._watch_s))

    async def pin(self, pool: str, deployment: str, *, pinned: bool) -> None:
        request = pool_pb2.PinModelRequest(deployment=deployment, pinned=pinned)
        await self._change(pool, lambda stub: stub.PinModel(request, timeout=_CHANGE_S))

    async def scale(self, pool: str, deployment: str, replicas: int) -> None:
        request = pool_pb2.ScaleModelRequest(deployment=deployment, replicas=replicas)
        await self._change(pool, lambda stub: stub.ScaleModel(request, timeout=_CHANGE_S))

    async def drain(self, pool: str, *, resume: bool) -> None:
        request = pool_pb2.DrainRequest(deadline_ms=_DRAIN_MS, resume=resume)
        await self._change(pool, lambda stub: stub.Drain(request, timeout=_CHANGE_S))

    async def close(self) -> None:
        await self._forget(set())

    async def _begin(self, name: str, call: Callable[[Any], Awaitable[Any]]) -> None:
        """As `_change`, for what may take long: when the time is up, a pool that answers is at work on it."""
        try:
            await self._change(name, call)
        except HelixError as exc:
            if exc.kind is not ErrorKind.DEADLINE:
                raise
            request = pool_pb2.GetCapacityRequest()
            await self._change(name, lambda stub: stub.GetCapacity(request, timeout=_DESCRIBE_S))

    async def _change(self, name: str, call: Callable[[Any], Awaitable[Any]]) -> None:
        pool = next((pool for pool in self._registry.pools if pool.name == name), None)
        if pool is None:
            raise HelixError(ErrorKind.NOT_FOUND, f"There is no pool {name!r}.", param="pool")
        try:
            await call(self._stub(pool))
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from exc

    async def _describe(self, pool: registry_pb2.Pool) -> pb.Pool:
        stub = self._stub(pool)
        address = "" if self._is_local(pool) else pool.address
        try:
            capacity, models = await asyncio.gather(
                stub.GetCapacity(pool_pb2.GetCapacityRequest(), timeout=_DESCRIBE_S),
                stub.ListModels(pool_pb2.ListModelsRequest(), timeout=_DESCRIBE_S),
            )
        except grpc.RpcError:
            return pb.Pool(name=pool.name, address=address)
        return pb.Pool(
            name=pool.name,
            address=address,
            reachable=True,
            draining=capacity.draining,
            ram_limit_bytes=capacity.ram_limit_bytes,
            ram_used_bytes=capacity.ram_used_bytes,
            cores=capacity.cores,
            devices=[_device(device) for device in capacity.devices],
            deployments=[_deployment(status) for status in models.deployments],
        )

    def _stub(self, pool: registry_pb2.Pool) -> Any:
        target = self._target(pool)
        channel = self._channels.get(target)
        if channel is None:
            channel = self._channels[target] = create_channel(
                socket_path(self._run_dir, "pool") if self._is_local(pool) else target, self._identity, "pool"
            )
        return pool_pb2_grpc.PoolServiceStub(channel)

    def _is_local(self, pool: registry_pb2.Pool) -> bool:
        return pool is self._registry.local

    def _target(self, pool: registry_pb2.Pool) -> str:
        return "" if self._is_local(pool) else pool.address

    async def _forget(self, kept: set[str]) -> None:
        """Closes the channels of pools that have gone."""
        gone = [self._channels.pop(target) for target in self._channels.keys() - kept]
        for channel in gone:
            await channel.close()


def _device(device: pool_pb2.Device) -> pb.PoolDevice:
    return pb.PoolDevice(
        uuid=device.uuid,
        name=device.name,
        memory_bytes=device.memory_bytes,
        used_bytes=device.used_bytes,
        utilisation_percent=device.utilisation_percent,
        replicas=device.replicas,
    )


def _deployment(status: pool_pb2.DeploymentStatus) -> pb.PoolDeployment:
    """What an operator may see: nothing of the keys of engines."""
    return pb.PoolDeployment(
        deployment=status.deployment,
        state=pool_pb2.DeploymentState.Name(status.state).removeprefix(_STATE_PREFIX).lower(),
        detail=status.detail,
        restarts=status.restarts,
        pinned=status.pinned,
        wanted_replicas=status.wanted_replicas,
        replicas=len(status.replicas),
        slots=sum(replica.slots for replica in status.replicas),
        busy=sum(replica.busy for replica in status.replicas),
        ram_bytes=status.memory.ram_bytes,
        gpu_bytes=status.memory.gpu_bytes,
        measured=status.memory.measured,
        last_used_at=status.last_used_ms // 1000,
    )
