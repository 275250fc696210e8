"""Slots leased over real gRPC by three gateways: shared by weight, never used twice, whoever is killed."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from helixflow.clients.slot_link import SlotLink
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.launching import EngineKind
from helixflow.pool.lifecycle import DeploymentView, ServingReplica, State
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.slot_service import SlotService
from helixflow.routing.slot_desk import Standing
from helixflow.rpc.channels import create_channel
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.rpc.servers import create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.deployments import LlamaCppDeployment
from tests.harness.pki import Pki, allow
from tests.harness.slot_fleet import Engines, Gateway, call_of, flood, until

DEPLOYMENT = "d"


class Servicer(pool_pb2_grpc.PoolServiceServicer):
    def __init__(self, slots: SlotService) -> None:
        self._slots = slots

    def LeaseSlots(self, request_iterator: Any, context: Any) -> Any:
        return self._slots.lease(request_iterator, context)


class ScriptedKind:
    """Engines that say what runs in them; their ports are their numbers."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    async def read_activity(self, port: int, key: str, deadline_s: float) -> int:
        return self._engines.running[list(self._engines.slots)[port - 1]]


class RpcPool:
    """The pool's half on a Unix socket, started and ended at will."""

    def __init__(self, pki: Pki, path: Path, engines: Engines) -> None:
        self.engines = engines
        self._pki = pki
        self._path = path
        self._stack = AsyncExitStack()
        self.service: SlotService | None = None

    async def start(self, *, inherited: bool = False) -> None:
        kind = cast(EngineKind, ScriptedKind(self.engines))
        service = self.service = SlotService({"llama_cpp": kind})
        planned = PlannedDeployment(DEPLOYMENT, "m", LlamaCppDeployment(engine="llama_cpp", max_queue=10_000), None)
        service.plan([planned])
        replicas = self.engines.view().replicas
        serving = tuple(
            ServingReplica(replica.__class__(replica.replica_id, "", number, "", replica.slots, 1), 0)
            for number, replica in enumerate(replicas, start=1)
        )
        view = DeploymentView(DEPLOYMENT, State.READY, "", 0, 0, serving)
        service.update([view], inherited=[one.replica.replica_id for one in serving] if inherited else ())
        identity = self._pki.identity("pool")
        server = create_server(identity, allow("helixflow.pool.v1.PoolService"))
        pool_pb2_grpc.add_PoolServiceServicer_to_server(Servicer(service), server)
        await listen(server, self._path, identity)
        await server.start()
        running = asyncio.create_task(service.run())

        async def stop() -> None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await server.stop(0)

        self._stack.push_async_callback(stop)

    async def stop(self) -> None:
        """As if killed: streams break without a word."""
        self.service = None
        await self._stack.aclose()


@asynccontextmanager
async def leasing(pool: RpcPool, pki: Pki, path: Path, name: str) -> AsyncIterator[Gateway]:
    gateway = Gateway(name, cast(Any, pool))
    async with create_channel(path, pki.identity("gateway"), "pool") as channel:
        link = asyncio.create_task(SlotLink(channel, DEPLOYMENT, name, gateway.desk).run())
        try:
            await until(lambda: gateway.desk.standing is Standing.CONNECTED)
            yield gateway
        finally:
            link.cancel()
            await asyncio.gather(link, return_exceptions=True)
            for call in gateway.calls:
                call.cancel()
            await asyncio.gather(*gateway.calls, return_exceptions=True)
            gateway.slots.close()


@asynccontextmanager
async def fleet(pki: Pki, tmp_path: Path, slots: Mapping[str, int]) -> AsyncIterator[tuple[RpcPool, list[Gateway]]]:
    prepare_run_dir(tmp_path / "run")
    path = socket_path(tmp_path / "run", "pool")
    pool = RpcPool(pki, path, Engines(slots))
    await pool.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(pool.stop)
        yield (
            pool,
            [await stack.enter_async_context(leasing(pool, pki, path, f"g{number}")) for number in range(3)],
        )


async def test_tokens_are_shared_by_weight_and_slots_are_never_exceeded(pki: Pki, tmp_path: Path) -> None:
    weights = {"a": 100, "b": 200, "c": 500}
    places = {"a": (0, 1, 2), "b": (0,), "c": (1, 2)}
    used: Counter[str] = Counter()
    async with fleet(pki, tmp_path, {"r1": 4, "r2": 4}) as (pool, members):
        rng = random.Random(1)
        floods = [
            asyncio.create_task(
                flood(
                    members[place],
                    lambda name=name: call_of(name, weight=weights[name]),  # type: ignore[misc]
                    used,
                    clients=12,
                    held_s=0.04,
                    tokens=4,
                    rng=rng,
                )
            )
            for name, at in places.items()
            for place in at
        ]
        await asyncio.sleep(1)
        used.clear()
        await asyncio.sleep(4)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        assert pool.engines.most == {"r1": 4, "r2": 4}
    for name, weight in weights.items():
        assert used[name] / sum(used.values()) == pytest.approx(weight / 800, rel=0.1)


async def test_with_one_gateway_killed_and_the_pool_restarted_no_slot_is_used_twice(pki: Pki, tmp_path: Path) -> None:
    async with fleet(pki, tmp_path, {"r1": 3, "r2": 3}) as (pool, members):
        used: Counter[str] = Counter()
        rng = random.Random(2)
        floods = [
            asyncio.create_task(flood(gateway, lambda: call_of("o"), used, clients=6, held_s=0.1, tokens=4, rng=rng))
            for gateway in members[:2]
        ]
        # What the third one runs goes on for a while after its stream is broken.
        lasting = [members[2].serve(call_of("o"), 1.0, 10) for _ in range(2)]
        await until(lambda: members[2].slots.in_flight == 2)
        await pool.stop()
        await asyncio.sleep(0.3)
        await pool.start(inherited=True)
        await until(lambda: all(gateway.desk.standing is Standing.CONNECTED for gateway in members))
        await asyncio.gather(*lasting)
        used.clear()
        await until(lambda: used["o"] > 100)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        assert pool.service is not None
        # All of them are there again.
        leases = [await members[0].slots.acquire(call_of("o", left_s=60)) for _ in range(6)]
        for lease in leases:
            lease.release()
        assert max(pool.engines.most.values()) == 3


async def test_a_deployment_that_is_not_here_is_refused(pki: Pki, tmp_path: Path) -> None:
    async with fleet(pki, tmp_path, {"r1": 1}):
        path = socket_path(tmp_path / "run", "pool")
        async with create_channel(path, pki.identity("gateway"), "pool") as channel:
            for first, kind in (
                (pool_pb2.LeaseSlotsRequest.Open(deployment="other", gateway="g"), ErrorKind.NOT_FOUND),
                (pool_pb2.LeaseSlotsRequest.Open(deployment=DEPLOYMENT), ErrorKind.INVALID_REQUEST),
            ):
                call = pool_pb2_grpc.PoolServiceStub(channel).LeaseSlots(timeout=60)
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.write(pool_pb2.LeaseSlotsRequest(open=first))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert from_rpc_error(caught.value).kind is kind


async def test_a_request_that_would_wait_too_long_is_refused_over_the_wire(pki: Pki, tmp_path: Path) -> None:
    async with fleet(pki, tmp_path, {"r1": 1}) as (_, members):
        for _ in range(3):
            await members[0].serve(call_of("o"), 0.5, 2)
        for _ in range(4):
            members[0].serve(call_of("o"), 60, 2)
        await until(lambda: members[1].desk.queued == 3)
        with pytest.raises(HelixError) as caught:
            await members[1].slots.acquire(call_of("o", left_s=0.2))
        assert caught.value.kind is ErrorKind.OVERLOADED
        assert caught.value.retry_after_s
