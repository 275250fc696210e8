"""The part of PoolService that is about models: which there are, and loading, unloading, pinning and scaling them."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.memory import Devices
from helixflow.pool.progress import PullProgress
from helixflow.pool.residency import Residency
from helixflow.pool.status import to_status, to_stored_model
from helixflow.pool.store import ModelStore
from helixflow.pool.supervisor import Supervisor
from helixflow.process.cores import usable_cores
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_PULL_REPORT_S: Final = 0.1
_LOAD_REPORT_S: Final = 1.0
_MAX_REPLICAS: Final = 64
_PHASES: Final = {
    "waiting": pool_pb2.PullModelResponse.PHASE_WAITING,
    "downloading": pool_pb2.PullModelResponse.PHASE_DOWNLOADING,
    "extracting": pool_pb2.PullModelResponse.PHASE_CHECKING,
    "verifying": pool_pb2.PullModelResponse.PHASE_CHECKING,
    "converting": pool_pb2.PullModelResponse.PHASE_CONVERTING,
}
_PULL_ERRORS: Final = {
    ExitCode.STORAGE: ErrorKind.STORAGE_FULL,
    ExitCode.UNAVAILABLE: ErrorKind.UPSTREAM_UNAVAILABLE,
    ExitCode.CONFIG: ErrorKind.INVALID_VALUE,
}


class ModelService(pool_pb2_grpc.PoolServiceServicer):
    """The gRPC face of `Supervisor`. Errors are `HelixError`s; the server's interceptor renders them.

    `name` is the pool's in the fleet.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        store: ModelStore,
        residency: Residency,
        devices: Devices,
        *,
        name: str,
        trust_domain: str,
    ) -> None:
        self._supervisor = supervisor
        self._store = store
        self._residency = residency
        self._devices = devices
        self._name = name
        self._trust_domain = trust_domain

    async def ListModels(self, request: pool_pb2.ListModelsRequest, context: Context) -> pool_pb2.ListModelsResponse:
        stored = await asyncio.to_thread(self._store.list)
        deployments = [to_status(view, self._trust_domain) for view in self._supervisor.snapshot()]
        return pool_pb2.ListModelsResponse(deployments=deployments, stored=[to_stored_model(one) for one in stored])

    async def PullModel(
        self, request: pool_pb2.PullModelRequest, context: Context
    ) -> AsyncIterator[pool_pb2.PullModelResponse]:
        spec = self._supervisor.spec_of(request.deployment)
        if spec is not None:
            async for progress in self._follow_pull(spec):
                yield pool_pb2.PullModelResponse(
                    phase=_PHASES[progress.phase], done_bytes=progress.done_bytes, total_bytes=progress.total_bytes or 0
                )
        yield pool_pb2.PullModelResponse(phase=pool_pb2.PullModelResponse.PHASE_DONE)

    async def LoadModel(self, request: pool_pb2.LoadModelRequest, context: Context) -> pool_pb2.LoadModelResponse:
        if request.wait:
            await self._supervisor.load_and_wait(request.deployment)
        else:
            self._supervisor.load(request.deployment)
        return pool_pb2.LoadModelResponse()

    async def UnloadModel(self, request: pool_pb2.UnloadModelRequest, context: Context) -> pool_pb2.UnloadModelResponse:
        if not 0 <= request.grace_s <= 86_400:
            raise HelixError(ErrorKind.INVALID_VALUE, "grace_s is 0 to 86400 seconds.", param="grace_s")
        await self._supervisor.unload(request.deployment, request.grace_s)
        return pool_pb2.UnloadModelResponse()

    async def PinModel(self, request: pool_pb2.PinModelRequest, context: Context) -> pool_pb2.PinModelResponse:
        self._supervisor.pin(request.deployment, request.pinned)
        return pool_pb2.PinModelResponse()

    async def ScaleModel(self, request: pool_pb2.ScaleModelRequest, context: Context) -> pool_pb2.ScaleModelResponse:
        if request.replicas > _MAX_REPLICAS:
            raise HelixError(ErrorKind.INVALID_VALUE, f"replicas is 0 to {_MAX_REPLICAS}.", param="replicas")
        self._supervisor.scale(request.deployment, request.replicas)
        return pool_pb2.ScaleModelResponse()

    async def WatchReplicas(
        self, request: pool_pb2.WatchReplicasRequest, context: Context
    ) -> AsyncIterator[pool_pb2.WatchReplicasResponse]:
        changes = self._supervisor.changes
        told: pool_pb2.WatchReplicasResponse | None = None
        while True:
            seen = changes.revision
            latest = self._watched()
            if latest != told:
                told = latest
                yield latest
            if changes.is_closed:
                return
            try:
                async with asyncio.timeout(_LOAD_REPORT_S):
                    await changes.wait_beyond(seen)
            except TimeoutError:
                continue  # nothing changed but, perhaps, the load

    async def GetCapacity(self, request: pool_pb2.GetCapacityRequest, context: Context) -> pool_pb2.GetCapacityResponse:
        limits, used = await self._residency.read_capacity()
        devices = await asyncio.to_thread(self._devices.devices)
        assigned: dict[str, list[str]] = {}
        for view in self._supervisor.snapshot():
            for serving in view.replicas:
                for uuid in serving.gpus:
                    assigned.setdefault(uuid, []).append(serving.replica.replica_id)
        return pool_pb2.GetCapacityResponse(
            pool=self._name,
            ram_limit_bytes=limits.ram_bytes,
            ram_used_bytes=used,
            cores=usable_cores(),
            devices=[
                pool_pb2.Device(
                    uuid=device.uuid,
                    name=device.name,
                    memory_bytes=device.memory_bytes,
                    used_bytes=device.used_bytes,
                    utilisation_percent=device.utilisation_percent,
                    parent=device.parent,
                    replicas=assigned.get(device.uuid, ()),
                )
                for device in devices
            ],
            draining=self._supervisor.is_draining,
        )

    async def Drain(self, request: pool_pb2.DrainRequest, context: Context) -> pool_pb2.DrainResponse:
        if request.resume:
            self._supervisor.resume()
            return pool_pb2.DrainResponse()
        return pool_pb2.DrainResponse(running=await self._supervisor.drain(request.deadline_ms / 1000))

    def _watched(self) -> pool_pb2.WatchReplicasResponse:
        """While the pool is drained its replicas go on with what they have, and are not there for anything new."""
        draining = self._supervisor.is_draining
        return pool_pb2.WatchReplicasResponse(
            deployments=[
                to_status(view, self._trust_domain, show_replicas=not draining) for view in self._supervisor.snapshot()
            ],
            pool=self._name,
            draining=draining,
        )

    async def _follow_pull(self, spec: ModelSpec) -> AsyncIterator[PullProgress]:
        """Reports of a pull, at most ten a second, until it is done. Raises `HelixError` with its reason."""
        latest: PullProgress | None = None
        news = asyncio.Event()

        def report(progress: PullProgress) -> None:
            nonlocal latest
            latest = progress
            news.set()

        pulling = asyncio.create_task(self._supervisor.pulls.pull(spec, report), name="pull")
        pulling.add_done_callback(lambda _task: news.set())
        next_report = 0.0
        try:
            while not pulling.done():
                await news.wait()
                news.clear()
                if latest is not None and (now := time.monotonic()) >= next_report:
                    next_report = now + _PULL_REPORT_S
                    progress, latest = latest, None
                    yield progress
            await pulling
        except UserError as exc:
            kind = _PULL_ERRORS.get(ExitCode(exc.exit_code), ErrorKind.UNPROCESSABLE)
            raise HelixError(kind, f"The model was not pulled: {exc.message}") from exc
        finally:
            pulling.cancel()
            await asyncio.wait((pulling,))
