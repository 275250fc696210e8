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


class LoadingPool(pool_pb2_grpc.PoolServiceServicer):
    """Loads for ever, or refuses as soon as it has looked."""

    def __init__(self) -> None:
        self.waited_for: list[bool] = []
        self.fits = True

    async def LoadModel(self, request: pool_pb2.LoadModelRequest, context: Any) -> pool_pb2.LoadModelResponse:
        self.waited_for.append(request.wait)
        if request.wait:
            if not self.fits:
                raise HelixError(ErrorKind.OVERLOADED, NUMBERS)
            await asyncio.Event().wait()
        return pool_pb2.LoadModelResponse()


@asynccontextmanager
async def administered(service: LoadingPool, tmp_path: Path) -> AsyncIterator[FleetPools]:
    pki = Pki(tmp_path)
    identity = pki.identity("control")
    server = create_server(identity, allow("helixflow.pool.v1.PoolService"))
    pool_pb2_grpc.add_PoolServiceServicer_to_server(service, server)
    await listen(server, tmp_path / "pool.sock", identity)
    await server.start()
    pools = FleetPools(Registry(registry_pb2.Pool(name="home")), pki.identity("auth"), tmp_path, refusal_s=0.2)
    try:
        yield pools
    finally:
        await pools.close()
        await server.stop(0)


async def test_whoever_loads_what_cannot_fit_is_told_the_numbers(tmp_path: Path) -> None:
    service = LoadingPool()
    service.fits = False
    async with administered(service, tmp_path) as pools:
        with pytest.raises(HelixError, match=NUMBERS) as caught:
            await pools.load("home", "a/llama_cpp-0")
        assert caught.value.kind is ErrorKind.OVERLOADED


async def test_a_long_load_goes_on_and_nobody_waits_for_it(tmp_path: Path) -> None:
    service = LoadingPool()
    async with administered(service, tmp_path) as pools, asyncio.timeout(5):
        await pools.load("home", "a/llama_cpp-0")
    assert service.waited_for == [False, True], "begun before it is watched"
