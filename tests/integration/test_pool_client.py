import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from helixflow.clients.pool import DeploymentView, PoolWatch
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.channels import create_channel
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.rpc.servers import create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from tests.harness.node import WAIT_S
from tests.harness.pki import Pki, allow

POOL = "helixflow.pool.v1.PoolService"


class ScriptedPool(pool_pb2_grpc.PoolServiceServicer):
    """Sends the snapshots that the test puts in; an exception put in is raised."""

    def __init__(self) -> None:
        self.script: asyncio.Queue[list[pool_pb2.DeploymentStatus] | Exception] = asyncio.Queue()
        self.loads: list[str] = []

    async def ListModels(self, request: Any, context: Any) -> pool_pb2.ListModelsResponse:
        raise KeyError("hfk_secret in a bug")

    async def LoadModel(self, request: Any, context: Any) -> pool_pb2.LoadModelResponse:
        if request.deployment != "m/llama_cpp-0":
            raise HelixError(ErrorKind.MODEL_NOT_FOUND, "There is no such deployment.", param="deployment")
        self.loads.append(request.deployment)
        return pool_pb2.LoadModelResponse()

    async def WatchReplicas(self, request: Any, context: Any) -> AsyncIterator[pool_pb2.WatchReplicasResponse]:
        while True:
            step = await self.script.get()
            if isinstance(step, Exception):
                raise step
            yield pool_pb2.WatchReplicasResponse(deployments=step)


def status(state: int, port: int = 0) -> pool_pb2.DeploymentStatus:
    replicas = [pool_pb2.Replica(replica_id="r", host="127.0.0.1", port=port, slots=4)] if port else []
    return pool_pb2.DeploymentStatus(deployment="m/llama_cpp-0", state=state, replicas=replicas)


@asynccontextmanager
async def pool_running(pki: Pki, path: Path, pool: ScriptedPool) -> AsyncIterator[None]:
    identity = pki.identity("pool")
    server = create_server(identity, allow(POOL))
    pool_pb2_grpc.add_PoolServiceServicer_to_server(pool, server)
    await listen(server, path, identity)
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    prepare_run_dir(tmp_path / "run")
    return socket_path(tmp_path / "run", "pool")


async def test_snapshots_arrive_survive_an_outage_and_go_on_after_it(pki: Pki, path: Path) -> None:
    changes: asyncio.Queue[dict[str, DeploymentView]] = asyncio.Queue()

    async def next_state() -> str:
        async with asyncio.timeout(WAIT_S):
            return (await changes.get())["m/llama_cpp-0"].state

    async with create_channel(path, pki.identity("gateway"), "pool") as channel:
        watch = PoolWatch(channel, changes.put_nowait)
        task = asyncio.create_task(watch.run())
        pool = ScriptedPool()
        async with pool_running(pki, path, pool):
            pool.script.put_nowait([status(pool_pb2.DEPLOYMENT_STATE_LOADING)])
            assert await next_state() == "loading"
            pool.script.put_nowait([status(pool_pb2.DEPLOYMENT_STATE_READY, 4000)])
            assert await next_state() == "ready"
            # A stream that breaks is opened again.
            pool.script.put_nowait(RuntimeError("a bug"))
            pool.script.put_nowait([status(pool_pb2.DEPLOYMENT_STATE_READY, 4001)])
            assert await next_state() == "ready"
        async with asyncio.timeout(WAIT_S):
            while watch.connected:
                await asyncio.sleep(0.005)
        assert watch.views["m/llama_cpp-0"].replicas[0].port == 4001
        again = ScriptedPool()
        again.script.put_nowait([status(pool_pb2.DEPLOYMENT_STATE_BACKOFF)])
        async with pool_running(pki, path, again):
            assert await next_state() == "backoff"
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()


async def test_loading_is_asked_for_and_errors_travel_typed(pki: Pki, path: Path) -> None:
    pool = ScriptedPool()
    async with pool_running(pki, path, pool), create_channel(path, pki.identity("gateway"), "pool") as channel:
        watch = PoolWatch(channel, lambda views: None)
        await watch.load("m/llama_cpp-0")
        assert pool.loads == ["m/llama_cpp-0"]
        with pytest.raises(HelixError) as caught:
            await watch.load("other")
        assert (caught.value.kind, caught.value.param) == (ErrorKind.MODEL_NOT_FOUND, "deployment")


async def test_an_unknown_exception_does_not_travel(pki: Pki, path: Path) -> None:
    channel = create_channel(path, pki.identity("gateway"), "pool")
    async with pool_running(pki, path, ScriptedPool()), channel:
        stub = pool_pb2_grpc.PoolServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(pool_pb2.ListModelsRequest(), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "hfk_secret" not in str(caught.value)
        assert from_rpc_error(caught.value).kind is ErrorKind.INTERNAL
