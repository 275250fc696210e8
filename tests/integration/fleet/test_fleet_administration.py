"""What administration asks of a pool, over gRPC: here a pool that says what the test wants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.launch.fleet import FleetPools
from helixflow.pool.registration import Registry
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc, registry_pb2
from helixflow.rpc.servers import create_server, listen
from tests.harness.pki import Pki, allow

NUMBERS = "needs 2.0 GB of RAM, the limit is 1.0 GB"


class BusyPool(pool_pb2_grpc.PoolServiceServicer):
    """Loads and unloads for ever, refuses a load as soon as it has looked, or says nothing at all."""

    def __init__(self) -> None:
        self.fits = True
        self.answers = True
        self.begun: list[str] = []

    async def LoadModel(self, request: pool_pb2.LoadModelRequest, context: Any) -> pool_pb2.LoadModelResponse:
        self.begun.append("load")
        if not self.fits:
            raise HelixError(ErrorKind.OVERLOADED, NUMBERS)
        await asyncio.Event().wait()
        return pool_pb2.LoadModelResponse()

    async def UnloadModel(self, request: pool_pb2.UnloadModelRequest, context: Any) -> pool_pb2.UnloadModelResponse:
        self.begun.append("unload")
        await asyncio.Event().wait()
        return pool_pb2.UnloadModelResponse()

    async def GetCapacity(self, request: pool_pb2.GetCapacityRequest, context: Any) -> pool_pb2.GetCapacityResponse:
        if not self.answers:
            await asyncio.Event().wait()
        return pool_pb2.GetCapacityResponse()


@asynccontextmanager
async def administered(service: BusyPool, tmp_path: Path, watch_s: float = 1) -> AsyncIterator[FleetPools]:
    pki = Pki(tmp_path)
    identity = pki.identity("control")
    server = create_server(identity, allow("helixflow.pool.v1.PoolService"))
    pool_pb2_grpc.add_PoolServiceServicer_to_server(service, server)
    await listen(server, tmp_path / "pool.sock", identity)
    await server.start()
    pools = FleetPools(Registry(registry_pb2.Pool(name="home")), pki.identity("auth"), tmp_path, watch_s=watch_s)
    try:
        yield pools
    finally:
        await pools.close()
        await server.stop(0)


async def test_whoever_loads_what_cannot_fit_is_told_the_numbers(tmp_path: Path) -> None:
    service = BusyPool()
    service.fits = False
    async with administered(service, tmp_path, watch_s=60) as pools:
        with pytest.raises(HelixError, match=NUMBERS) as caught:
            await pools.load("home", "a/llama_cpp-0")
        assert caught.value.kind is ErrorKind.OVERLOADED


async def test_what_takes_long_goes_on_and_nobody_waits_for_it(tmp_path: Path) -> None:
    service = BusyPool()
    async with administered(service, tmp_path) as pools, asyncio.timeout(60):
        await pools.load("home", "a/llama_cpp-0")
        await pools.unload("home", "a/llama_cpp-0")
    assert service.begun == ["load", "unload"]


async def test_a_pool_that_says_nothing_has_not_done_it(tmp_path: Path) -> None:
    service = BusyPool()
    service.answers = False
    async with administered(service, tmp_path) as pools, asyncio.timeout(60):
        with pytest.raises(HelixError) as caught:
            await pools.unload("home", "a/llama_cpp-0")
        assert caught.value.kind is ErrorKind.DEADLINE
