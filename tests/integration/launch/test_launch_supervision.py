"""The pool's supervisor over a real launcher: with llama.cpp, and with a foreign `llama-server`."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.llama_cpp.probe import LlamaCppKind
from helixflow.pool.activity import NoActivity
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.launcher_client import LauncherClient
from helixflow.pool.lifecycle import DeploymentView, State
from helixflow.pool.manifest import StoredModel
from helixflow.pool.measured import MemoryFigures
from helixflow.pool.memory import Limits, NoDevices
from helixflow.pool.plan import plan_deployments
from helixflow.pool.replica import HealthPolicy
from helixflow.pool.residency import Residency
from helixflow.pool.service import PoolService, PoolServices
from helixflow.pool.slot_service import SlotService
from helixflow.pool.store import ModelStore
from helixflow.pool.supervisor import Supervisor
from helixflow.process.backoff import Backoff
from helixflow.rpc.channels import create_channel
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.rpc.servers import create_server, listen
from helixflow.settings.deployments import LlamaCppDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings
from helixflow.transport.client import HttpClient
from tests.harness.pki import Pki, allow
from tests.integration.launch.conftest import WAIT_S, Running

POLICY = HealthPolicy(interval_s=0.05, deadline_s=10, failures=3)
IMPATIENT = HealthPolicy(interval_s=0.05, deadline_s=1, failures=3)
PROPS = {
    "total_slots": 3,
    "default_generation_settings": {"n_ctx": 2048},
    "chat_template_caps": {"supports_tools": True},
    "chat_template": "x" * 100_000,
}

# A llama-server as the pool sees one: flags, LLAMA_API_KEY, /health that loads at first, /props behind the key.
SERVER = f"""#!{sys.executable}
import http.server, json, os, sys
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
with open(os.path.join(os.path.dirname(__file__), "seen.json"), "w") as file:
    json.dump({{"argv": sys.argv[1:], "keyed": bool(os.environ["LLAMA_API_KEY"])}}, file)
polls = 0
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global polls
        polls += 1
        keyed = self.headers["authorization"] == "Bearer " + os.environ["LLAMA_API_KEY"]
        status = 503 if self.path == "/health" and polls < 3 else 200 if keyed else 401
        body = json.dumps({PROPS!r} if self.path == "/props" else {{"status": "ok"}}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Server).serve_forever()
"""


class Pool:
    """A supervisor over a launcher, and waiting for what it shows."""

    def __init__(self, supervisor: Supervisor, client: HttpClient) -> None:
        self.supervisor = supervisor
        self.client = client

    async def until(self, wanted: Callable[[DeploymentView], bool], seconds: float = WAIT_S) -> DeploymentView:
        changes = self.supervisor.changes
        async with asyncio.timeout(seconds):
            while not wanted(view := self.supervisor.snapshot()[0]):
                await changes.wait_beyond(changes.revision)
        return view


@asynccontextmanager
async def supervised(
    launcher: Running, model: StoredModel, policy: HealthPolicy = POLICY, **settings: Any
) -> AsyncIterator[Pool]:
    deployment = LlamaCppDeployment(engine="llama_cpp", source=f"file:{model.path}", **settings)
    tree = Settings(data_dir=launcher.folder, models=(ModelSettings(name="m", deployments=(deployment,)),))
    async with AsyncExitStack() as stack:
        client = HttpClient(max_connections=8)
        stack.push_async_callback(client.close)
        engines = await LauncherClient.connect(launcher.socket_path)
        stack.push_async_callback(engines.close)
        supervisor = Supervisor(
            plan_deployments(tree, Catalogue([])),
            engines,
            {"llama_cpp": LlamaCppKind(client)},
            lambda _spec, _report: model,
            figures=MemoryFigures(launcher.folder / "measured.json", NoDevices()),
            policy=policy,
            make_backoff=lambda: Backoff(initial_s=0.05, maximum_s=0.1),
        )
        task = asyncio.create_task(supervisor.run())
        try:
            yield Pool(supervisor, client)
        finally:
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled(), "the supervisor failed"


def is_ready(view: DeploymentView) -> bool:
    return view.state is State.READY


def is_failed(view: DeploymentView) -> bool:
    return view.state is State.FAILED


@pytest.fixture
def server(tmp_path: Path) -> Path:
    path = tmp_path / "llama-server"
    path.write_text(SERVER)
    path.chmod(0o755)
    return path


async def test_a_killed_engine_comes_back_as_another_replica(launcher: Running, chat_model: StoredModel) -> None:
    async with supervised(launcher, chat_model, context=1024, parallel=2) as pool:
        first = (await pool.until(is_ready)).replicas[0]
        assert (first.replica.slots, first.replica.context, first.replica.supports_tools) == (2, 1024, False)
        os.kill(first.pid, signal.SIGKILL)
        gone = await pool.until(lambda view: not view.replicas)
        assert gone.state in (State.LOADING, State.BACKOFF)
        second = await pool.until(lambda view: bool(view.replicas))
        assert second.restarts == 1
        assert second.replicas[0].replica.replica_id != first.replica.replica_id


async def test_the_key_is_not_visible_to_other_users(launcher: Running, chat_model: StoredModel) -> None:
    async with supervised(launcher, chat_model, context=512) as pool:
        serving = (await pool.until(is_ready)).replicas[0]
        assert serving.replica.api_key not in " ".join(psutil.Process(serving.pid).cmdline())
        assert serving.replica.api_key not in launcher.log_path.read_text()


async def test_a_truncated_model_file_is_refused_before_an_engine_starts(
    launcher: Running, chat_model: StoredModel, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    with chat_model.path.open("rb") as whole:
        broken.write_bytes(whole.read(2_000_000))
    async with supervised(launcher, replace(chat_model, path=broken), context=512) as pool:
        view = await pool.until(is_failed)
        assert view.detail == "m/llama_cpp-0: broken.gguf cannot be used: it was cut short"
        assert view.replicas == ()
        assert not launcher.records("engine.started")


async def test_a_restarted_control_takes_engines_over(launcher: Running, chat_model: StoredModel) -> None:
    async with supervised(launcher, chat_model, context=512) as pool:
        before = (await pool.until(is_ready)).replicas
    async with supervised(launcher, chat_model, context=512) as pool:
        view = await pool.until(is_ready)
        assert (view.replicas, view.restarts) == (before, 0)
        os.kill(before[0].pid, signal.SIGKILL)
        await pool.until(lambda view: view.restarts == 1 and is_ready(view))


async def test_a_binary_of_ones_own_serves_under_the_same_contract(
    launcher: Running, chat_model: StoredModel, server: Path
) -> None:
    async with supervised(launcher, chat_model, binary=server, context=4096, parallel=3, threads=1) as pool:
        serving = (await pool.until(is_ready)).replicas[0]
        assert (serving.replica.slots, serving.replica.context, serving.replica.supports_tools) == (3, 2048, True)
        seen = json.loads((server.parent / "seen.json").read_text())
        assert seen["keyed"]
        assert serving.replica.api_key not in " ".join(seen["argv"])
        flags = seen["argv"]
        assert flags[flags.index("--model") + 1] == str(chat_model.path)
        assert flags[flags.index("--ctx-size") + 1] == "4096"
        assert psutil.Process(serving.pid).ppid() == launcher.process.pid, "the shim became the program"


async def test_an_engine_that_hangs_is_replaced(launcher: Running, chat_model: StoredModel, server: Path) -> None:
    async with supervised(launcher, chat_model, IMPATIENT, binary=server) as pool:
        first = (await pool.until(is_ready)).replicas[0]
        os.kill(first.pid, signal.SIGSTOP)
        view = await pool.until(lambda view: view.restarts == 1 and is_ready(view))
        assert view.replicas[0].pid != first.pid
        assert not psutil.pid_exists(first.pid)


async def test_a_binary_that_is_no_llama_server_fails(launcher: Running, chat_model: StoredModel) -> None:
    async with supervised(launcher, chat_model, binary="/bin/false") as pool:
        assert (await pool.until(is_failed)).detail == "ended with status 1"


async def test_watchers_follow_over_grpc(
    launcher: Running, chat_model: StoredModel, server: Path, pki: Pki, tmp_path: Path
) -> None:
    async with supervised(launcher, chat_model, binary=server, load="first_use") as pool:
        identity = pki.identity("control")
        rpc = create_server(identity, allow("helixflow.pool.v1.PoolService"))
        residency = Residency(lambda _given: Limits(1 << 40), NoActivity(), SystemClock())
        service = PoolService(
            pool.supervisor,
            ModelStore(tmp_path),
            residency,
            NoDevices(),
            name="node",
            trust_domain="helixflow.internal",
        )
        services = PoolServices(pool.supervisor, service, pool.client, lambda _models: (), SlotService({}))
        services.register(rpc)
        socket_path = launcher.settings.run_dir / "pool.sock"
        await listen(rpc, socket_path, identity)
        await rpc.start()
        channel = create_channel(socket_path, pki.identity("gateway"), "control")
        async with channel, asyncio.timeout(WAIT_S):
            stub = pool_pb2_grpc.PoolServiceStub(channel)
            watch = stub.WatchReplicas(pool_pb2.WatchReplicasRequest())
            first = await watch.read()
            assert first.deployments[0].state == pool_pb2.DEPLOYMENT_STATE_IDLE
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.LoadModel(pool_pb2.LoadModelRequest(deployment="nobody"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            await stub.LoadModel(pool_pb2.LoadModelRequest(deployment="m/llama_cpp-0"))
            while (status := (await watch.read()).deployments[0]).state != pool_pb2.DEPLOYMENT_STATE_READY:
                assert not status.replicas
            (replica,) = status.replicas
            assert (replica.host, replica.slots, replica.supports_tools) == ("127.0.0.1", 3, True)
            assert replica.pid
            await services.close()
            while await watch.read() is not grpc.aio.EOF:
                pass
        await rpc.stop(0)
        assert not socket_path.exists()


async def test_a_lost_launcher_is_noticed(launcher: Running) -> None:
    client = await LauncherClient.connect(launcher.socket_path)
    engine = await client.start(
        "e", [sys.executable, "-c", "import time; time.sleep(60)"], env={}, stdin="", meta={"a": 1}
    )
    launcher.process.kill()
    async with asyncio.timeout(WAIT_S):
        await client.lost.wait()
        with pytest.raises(HelixError) as caught:
            await engine.exited
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        with pytest.raises(HelixError):
            await client.list()
    await client.close()
