"""What a gateway's choice of a replica costs with one pool and with forty that it watches, of as many replicas."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.report import Options, Result, median, spread
from helixflow.core.call import Call, Operation
from helixflow.core.capacity import Replica
from helixflow.core.clock import SystemClock
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.validation import decode_fields
from helixflow.launch.gateway_pools import GatewayPools
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import ensure_pki
from helixflow.pki.names import SERVICES
from helixflow.pool import registration
from helixflow.pool.lifecycle import DeploymentView, ServingReplica, State
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.registration import Registry, RegistryService
from helixflow.pool.service import SERVICE_NAME
from helixflow.pool.slot_service import SlotService
from helixflow.pool.status import to_status
from helixflow.routing.balancing import Balancer
from helixflow.rpc.channels import create_channel
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc, registry_pb2
from helixflow.rpc.servers import create_server, listen, listen_tcp
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.deployments import LlamaCppDeployment
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

POOLS: Final = 40
LIMIT_RATIO: Final = 1.10
_NAME: Final = "m/llama_cpp-0"
_DEPLOYMENT: Final = LlamaCppDeployment(engine="llama_cpp", source="file:/none", parallel=4)
_BATCH: Final = 500
_START_S: Final = 30.0
_POLICY: Final = {SERVICE_NAME: frozenset({"gateway"}), registration.SERVICE_NAME: frozenset({"gateway"})}


class _Pool(pool_pb2_grpc.PoolServiceServicer):
    """A pool with replicas that never see a request: their load changes, and their slots are leased for real."""

    def __init__(self, name: str, replicas: int) -> None:
        self._name = name
        self._serving = tuple(
            ServingReplica(Replica(f"{name}-{number}", "127.0.0.1", 1, "k", 4, 8192), 1) for number in range(replicas)
        )
        self.slots = SlotService({})
        self.slots.plan([PlannedDeployment(_NAME, "m", _DEPLOYMENT, None)])
        self.slots.update([self._view(0)])

    def LeaseSlots(self, requests: Any, context: Any) -> Any:
        return self.slots.lease(requests, context)

    async def WatchReplicas(
        self, request: pool_pb2.WatchReplicasRequest, context: Any
    ) -> AsyncIterator[pool_pb2.WatchReplicasResponse]:
        busy = 0
        while True:
            status = to_status(self._view(busy), "helixflow.internal")
            yield pool_pb2.WatchReplicasResponse(deployments=[status], pool=self._name)
            await asyncio.sleep(1)
            busy = (busy + 1) % 5

    def _view(self, busy: int) -> DeploymentView:
        load = {one.replica.replica_id: busy for one in self._serving}
        return DeploymentView(_NAME, State.READY, "", 0, 0, self._serving, busy=load)


def run(options: Options) -> list[Result]:
    configure_logging("error", "text", service="benchmark")
    return uvloop.run(_measure(options))


async def _measure(options: Options) -> list[Result]:
    """Both at the same time and by turns: a machine that others slow down slows both."""
    rounds = options.rounds * (8 if options.quick else 24)
    async with _gateway(1, POOLS) as one, _gateway(POOLS, 1) as many:
        times: dict[str, list[float]] = {"one": [], "many": []}
        for number in range(2 * rounds):
            name, pools = (("one", one), ("many", many))[number % 2]
            times[name].append(await _choose(pools))
            # What watches and leases cost beside it is theirs to do in between.
            await asyncio.sleep(0.02)
    ratios = [b / a for a, b in zip(times["one"], times["many"], strict=True)]
    one_us, many_us = median(times["one"]), median(times["many"])
    return [
        Result("many_pools", "a lease, one pool", one_us, "µs", detail=spread(times["one"])),
        Result("many_pools", f"a lease, {POOLS} pools", many_us, "µs", detail=spread(times["many"])),
        Result("many_pools", "ratio", median(ratios), "", LIMIT_RATIO, detail=spread(ratios)),
    ]


async def _choose(pools: GatewayPools) -> float:
    """Microseconds of this thread's CPU for a lease, taken and given back."""
    slots = pools.open_slots(_NAME, _DEPLOYMENT)
    calls = [_call(number) for number in range(_BATCH)]
    started = time.thread_time()
    for call in calls:
        (await slots.acquire(call)).release()
    return (time.thread_time() - started) / _BATCH * 1e6


@asynccontextmanager
async def _gateway(pools: int, replicas: int) -> AsyncIterator[GatewayPools]:
    """One that has learnt of so many pools, with so many replicas each, and has slots of all."""
    async with AsyncExitStack() as stack:
        settings = Settings(data_dir=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-"))))
        ensure_pki(settings, SERVICES)
        prepare_run_dir(settings.run_dir)
        registry = Registry()
        control = create_server(ServiceIdentity.open(settings, "control"), _POLICY)
        RegistryService(registry).register(control)
        path = socket_path(settings.run_dir, "control")
        await listen(control, path, ServiceIdentity.open(settings, "control"))
        await control.start()
        stack.push_async_callback(control.stop, 0)
        registry.open()
        stack.callback(registry.close)
        for number in range(pools):
            registry.join(await _start(f"p{number}", _Pool(f"p{number}", replicas), settings, stack))
        identity = ServiceIdentity.open(settings, "gateway")
        channel = create_channel(path, identity, "auth")
        stack.push_async_callback(channel.close)
        watching = GatewayPools(settings, identity, channel, Balancer.of(settings.routing, SystemClock()))
        slots = watching.open_slots(_NAME, _DEPLOYMENT)
        following = asyncio.create_task(watching.run())
        stack.push_async_callback(watching.close)
        stack.push_async_callback(_end, following)
        async with asyncio.timeout(_START_S):
            while _shown(watching) < pools * replicas or not slots.figures:
                await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        yield watching


def _shown(pools: GatewayPools) -> int:
    view = pools.views.get(_NAME)
    return len(view.replicas) if view is not None else 0


async def _start(name: str, pool: _Pool, settings: Settings, stack: AsyncExitStack) -> registry_pb2.Pool:
    identity = ServiceIdentity.open(settings, "pool")
    server = create_server(identity, _POLICY)
    pool_pb2_grpc.add_PoolServiceServicer_to_server(pool, server)
    port = await listen_tcp(server, "127.0.0.1", 0, identity)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    stack.push_async_callback(_end, asyncio.create_task(pool.slots.run()))
    stack.callback(pool.slots.close)
    return registry_pb2.Pool(name=name, address=f"127.0.0.1:{port}", data_address="127.0.0.1:1", node_id=name)


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _call(number: int) -> Call:
    body = b'{"model":"m","messages":[{"role":"user","content":"Question %d"}]}' % number
    principal = Principal(PrincipalKind.KEY, "key", "key", "org", "project")
    deadline = asyncio.get_running_loop().time() + 60
    fields, params = decode_fields(body), parse_chat(body)
    return Call(f"c{number}", "r", principal, Operation.CHAT, "m", fields, params, False, False, deadline, len(body))
