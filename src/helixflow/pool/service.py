"""PoolService of proto/helixflow/pool/v1 over the supervisor, and what the control process starts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final

import grpc

from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.launching import EngineKind
from helixflow.engines.llama_cpp.probe import LlamaCppKind
from helixflow.engines.vllm.command import require_vllm
from helixflow.engines.vllm.kind import VllmKind
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.device_cleanup import DeviceCleaner, MarkedEngines, owner_of
from helixflow.pool.devices import NvmlDevices, open_devices
from helixflow.pool.generate import Generator
from helixflow.pool.launcher_client import Engines
from helixflow.pool.measured import MemoryFigures
from helixflow.pool.memory import Devices, read_limits
from helixflow.pool.model_service import ModelService
from helixflow.pool.plan import PlannedDeployment, plan_deployments, pool_name
from helixflow.pool.replica import HealthPolicy
from helixflow.pool.residency import Residency
from helixflow.pool.slot_service import SlotService
from helixflow.pool.store import ModelStore
from helixflow.pool.supervisor import Supervisor
from helixflow.pool.tokenizers import read_tokenizer
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.settings.deployments import VllmDeployment
from helixflow.settings.masking import secret_variables
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings
from helixflow.transport.client import HttpClient

_Context = grpc.aio.ServicerContext[Any, Any]
_ASKING_EXPIRY_S: Final = 0.5
SERVICE_NAME = pool_pb2.DESCRIPTOR.services_by_name["PoolService"].full_name


class PoolService(ModelService):
    """All of it: models, slots, and what peers ask for."""

    generator: Generator | None = None
    slots: SlotService | None = None

    def LeaseSlots(self, request_iterator: AsyncIterator[pool_pb2.LeaseSlotsRequest], context: _Context) -> Any:
        assert self.slots is not None
        return self.slots.lease(request_iterator, context)

    async def Generate(
        self, request: pool_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[pool_pb2.GenerateResponse]:
        if self.generator is None:
            raise HelixError(ErrorKind.UNSUPPORTED, "This pool does not generate.")
        async with aclosing(self.generator.generate(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def ReadTokenizer(
        self, request: pool_pb2.ReadTokenizerRequest, context: _Context
    ) -> AsyncIterator[pool_pb2.ReadTokenizerResponse]:
        async with aclosing(read_tokenizer(self._supervisor.snapshot(), request.sha256)) as pieces:
            async for piece in pieces:
                yield pool_pb2.ReadTokenizerResponse(data=piece)


class PoolServices:
    """Everything the pool consists of in this process: `register`, then `run` until cancelled, then `close`."""

    def __init__(
        self,
        supervisor: Supervisor,
        service: PoolService,
        client: HttpClient,
        plan: Callable[[Sequence[ModelSettings]], Sequence[PlannedDeployment]],
        slots: SlotService,
        cleaner: DeviceCleaner | None = None,
    ) -> None:
        """`plan` is called in a thread. `cleaner` looks after the GPUs, if there are any."""
        self._cleaner = cleaner
        self.supervisor = supervisor
        self._slots = slots
        self._service = service
        service.slots = slots
        self._client = client
        self._plan = plan

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to `server`, whose full name is `SERVICE_NAME`."""
        pool_pb2_grpc.add_PoolServiceServicer_to_server(self._service, server)

    def set_generator(self, generator: Generator) -> None:
        """What answers Generate; without it that is refused."""
        self._service.generator = generator

    async def apply(self, models: Sequence[ModelSettings]) -> None:
        """Runs the deployments of these complete models that this node is for, see `Supervisor.apply`. Raises
        `UserError` (CONFIG) for models that it cannot run; nothing has changed then.
        """
        planned = await asyncio.to_thread(self._plan, models)
        self.supervisor.apply(planned)
        self._slots.plan(planned)

    async def run(self) -> None:
        """Supervises until cancelled. Raises a group with a `HelixError` (UNAVAILABLE) when the launcher is lost at the
        start.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.supervisor.run(), name="supervisor")
            tasks.create_task(self._slots.run(), name="slots")
            tasks.create_task(self._follow_replicas(), name="replicas")
            if self._cleaner is not None:
                tasks.create_task(self._cleaner.run(), name="devices")

    async def _follow_replicas(self) -> None:
        """Slots are those of the replicas that serve."""
        changes = self.supervisor.changes
        while not changes.is_closed:
            seen = changes.revision
            self._slots.drain(resume=not self.supervisor.is_draining)
            self._slots.update(self.supervisor.snapshot(), inherited=self.supervisor.adopted)
            await changes.wait_beyond(seen)

    async def close(self) -> None:
        """Ends all watches, which else never end. Engines go on. Idempotent."""
        self.supervisor.changes.close()
        self._slots.close()
        await self._client.close()


def create_pool(settings: Settings, engines: Engines, *, devices: Devices | None = None) -> PoolServices:
    """The pool for settings that are filled from the catalogue. Raises `UserError` (CONFIG)."""
    catalogue = Catalogue.load()
    owner = owner_of(settings.data_dir)
    engines = marked = MarkedEngines(engines, owner)
    marked.hidden = secret_variables(settings.models)

    def plan(models: Sequence[ModelSettings]) -> Sequence[PlannedDeployment]:
        planned = plan_deployments(settings.model_copy(update={"models": tuple(models)}), catalogue)
        marked.hidden |= secret_variables(models)
        for one in planned:
            if isinstance(one.settings, VllmDeployment):
                require_vllm(one.name, one.settings)
        return planned

    # What is there at the start was checked by whoever started us.
    planned = plan_deployments(settings, catalogue)
    # Engines are asked every few seconds: a connection that waits for that costs more than it saves.
    client = HttpClient(max_connections=8, idle_expiry_s=_ASKING_EXPIRY_S)
    store = ModelStore(settings.models_dir)
    clock = SystemClock()
    pool = settings.pool
    devices = devices if devices is not None else open_devices()
    kinds: dict[str, EngineKind] = {"llama_cpp": LlamaCppKind(client), "vllm": VllmKind(client)}
    slots = SlotService(kinds, clock=clock)
    slots.plan(planned)
    residency = Residency(partial(read_limits, pool, devices), slots, clock, min_residence_s=pool.min_residence_s)
    supervisor = Supervisor(
        planned,
        engines,
        kinds,
        store.pull,
        residency=residency,
        figures=MemoryFigures(pool.measurements_file or settings.models_dir / "measured.json", devices),
        activity=slots,
        policy=HealthPolicy(load_timeout_s=pool.load_deadline_s, end_grace_s=settings.gateway.request_timeout_s),
        clock=clock,
    )
    service = PoolService(
        supervisor, store, residency, devices, name=pool_name(settings), trust_domain=settings.pki.trust_domain
    )
    cleaner = None
    if pool.gpu_cleanup and isinstance(devices, NvmlDevices):
        cleaner = DeviceCleaner(devices.processes, engines, owner)
    return PoolServices(supervisor, service, client, plan, slots, cleaner)
