"""A gateway whose engines are all on another node: through the data port, and nothing a client would notice."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import msgspec
import pytest

from helixflow.cli.main import main
from helixflow.core.capacity import Replica
from helixflow.core.errors import ErrorKind, ExitCode
from helixflow.launch.serving_cache import read_cache
from helixflow.pki.files import PkiFolder
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import ensure_pki
from helixflow.pool.manifest import StoredModel
from helixflow.rpc.channels import create_channel
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.settings.tree import Settings
from tests.harness.engine import RunningEngine
from tests.harness.fleet import PoolProcess, give_certificate, run_fleet
from tests.harness.node import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    EMBEDDINGS,
    WAIT_S,
    Node,
    command_of,
    environment,
    eventually,
    until,
)

# Promised are 0.2 s on a quiet machine; the answers that are left take longer than this.
FREED_S = 10.0
CONFIG = """
[[models]]
name = "smollm2-135m-instruct"
[[models.deployments]]
engine = "llama_cpp"
nodes = ["far"]
parallel = 2
context = 2048
[[models]]
name = "all-minilm-l6-v2"
[[models.deployments]]
engine = "llama_cpp"
nodes = ["far"]
load = "first_use"
context = 256
"""


@pytest.fixture(scope="module")
def fleet(
    chat_model: StoredModel, embedding_model: StoredModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Node, PoolProcess]]:
    folder = tmp_path_factory.mktemp("fleet")
    config = folder / "helixflow.toml"
    config.write_text(CONFIG)
    with run_fleet(folder, chat_model, embedding_model, config=config) as running:
        yield running


@pytest.fixture
def near(fleet: tuple[Node, PoolProcess]) -> Node:
    return fleet[0]


@pytest.fixture
def far(fleet: tuple[Node, PoolProcess]) -> PoolProcess:
    return fleet[1]


@asynccontextmanager
async def stub_of(
    far: PoolProcess, near: Node, service: str = "gateway"
) -> AsyncIterator[pool_pb2_grpc.PoolServiceStub]:
    """A peer of the first node that calls the pool of the second."""
    identity = ServiceIdentity.open(Settings(data_dir=near.data_dir), service)
    async with create_channel((far.data_dir / "run" / "pool.address").read_text(), identity, "pool") as channel:
        yield pool_pb2_grpc.PoolServiceStub(channel)


async def engine_of(far: PoolProcess, near: Node, model: str = CHAT_MODEL) -> RunningEngine:
    """Its engine as soon as the pool lists it, which may have been started anew."""
    async with stub_of(far, near) as stub, asyncio.timeout(WAIT_S):
        replicas: Sequence[pool_pb2.Replica] = ()
        while not replicas:
            listed = await stub.ListModels(pool_pb2.ListModelsRequest(), timeout=WAIT_S, wait_for_ready=True)
            replicas = next(one.replicas for one in listed.deployments if one.deployment.startswith(f"{model}/"))
    (replica,) = replicas
    known = Replica(replica.replica_id, "127.0.0.1", replica.port, replica.api_key, replica.slots, replica.context)
    return RunningEngine(known, far.process)


def others(node: Node | PoolProcess, module: str, known: int) -> list[int]:
    """Processes of a module beside a known one."""
    processes = (one for one in node.tree() if one.pid != known)
    return [one.pid for one in processes if module in command_of(one)]


async def test_an_answer_streams_from_the_other_node(near: Node, far: PoolProcess) -> None:
    assert not [one for one in near.tree() if "llama_cpp.child" in " ".join(command_of(one))], "no engine here"
    async with await near.connect() as wire:
        answer = await wire.ask(near.chat_request("What is the capital of France?", stream=True, max_tokens=12))
    assert answer.status == 200
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in answer.chunks)
    whole = await near.chat("What is the capital of France?", max_tokens=12)
    assert streamed and whole.json["choices"][0]["message"]["content"] == streamed


async def test_a_client_that_leaves_frees_the_slot_there(near: Node, far: PoolProcess) -> None:
    engine = await engine_of(far, near)
    for _ in range(3):
        wire = await near.connect()
        wire.send(near.endless_request(max_tokens=1500))
        await eventually(lambda: engine.busy_slots == 1)
        wire.drop()
        async with asyncio.timeout(FREED_S):
            while engine.busy_slots:
                await asyncio.sleep(0.01)


async def test_text_is_embedded_with_the_other_nodes_tokenizer(near: Node) -> None:
    async with await near.connect() as wire:
        answer = await wire.ask(near.request(EMBEDDINGS, {"model": EMBEDDING_MODEL, "input": ["a cat", "ein Hund"]}))
    assert answer.status == 200, answer.body
    assert [len(one["embedding"]) for one in json.loads(answer.body)["data"]] == [384, 384]
    (kept,) = (near.data_dir / "cache" / "tokenizers").iterdir()
    assert kept.suffix == ".json" and kept.stat().st_mode & 0o077 == 0


async def test_a_tokenizer_is_read_by_its_digest_only(near: Node, far: PoolProcess) -> None:
    async with stub_of(far, near) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.ReadTokenizer(pool_pb2.ReadTokenizerRequest(sha256="00" * 32), timeout=WAIT_S):
                pass
        assert from_rpc_error(caught.value).kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize("stream", [True, False])
async def test_a_peer_generates_over_grpc(near: Node, far: PoolProcess, stream: bool) -> None:
    body = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body |= {"max_tokens": 12, "temperature": 0, "stream": stream}
    request = pool_pb2.GenerateRequest(operation="chat/completions", body=msgspec.json.encode(body))
    async with stub_of(far, near) as stub:
        answers = [answer async for answer in stub.Generate(request, timeout=WAIT_S)]
    text = b"".join(answer.data for answer in answers)
    if stream:
        assert text.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(text)["choices"][0]["message"]["content"]
    usage = answers[-1].usage
    assert (usage.completion_tokens > 0, usage.prompt_tokens > 0, bool(usage.finish_reason)) == (True, True, True)


async def test_a_generation_ends_with_its_call_and_mistakes_are_told(near: Node, far: PoolProcess) -> None:
    engine = await engine_of(far, near)
    message = {"role": "user", "content": "Count from one to one thousand."}
    body = {"model": CHAT_MODEL, "messages": [message], "stream": True, "max_tokens": 1500, "logit_bias": {"2": -100}}
    async with stub_of(far, near) as stub:
        call = stub.Generate(
            pool_pb2.GenerateRequest(operation="chat/completions", body=msgspec.json.encode(body)), timeout=WAIT_S
        )
        assert (await call.read()).data
        await eventually(lambda: engine.busy_slots == 1)
        call.cancel()
        async with asyncio.timeout(FREED_S):
            while engine.busy_slots:
                await asyncio.sleep(0.01)
        for operation, text, kind in (
            ("chat/completions", b"{", ErrorKind.INVALID_JSON),
            ("chat/completions", b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', None),
            ("images", b"{}", ErrorKind.INVALID_VALUE),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pool_pb2.GenerateRequest(operation=operation, body=text), timeout=WAIT_S).read()
            assert from_rpc_error(caught.value).kind is (kind or ErrorKind.MODEL_NOT_FOUND)


async def test_administration_is_not_for_gateways(near: Node, far: PoolProcess) -> None:
    async with stub_of(far, near) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.UnloadModel(pool_pb2.UnloadModelRequest(deployment="x"), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    async with stub_of(far, near, "control") as stub:
        capacity = await stub.GetCapacity(pool_pb2.GetCapacityRequest(), timeout=WAIT_S)
        assert capacity.pool == "far"


async def test_while_all_pools_that_have_a_model_drain_the_client_is_told_at_once(near: Node, far: PoolProcess) -> None:
    async with stub_of(far, near, "control") as stub:
        await stub.Drain(pool_pb2.DrainRequest(deadline_ms=1), timeout=WAIT_S)
        try:
            async with asyncio.timeout(WAIT_S):
                while (answer := await near.chat("Say yes.")).status == 200:
                    pass  # the gateway has not heard of it yet
            assert (answer.status, answer.json["error"]["code"]) == (503, "model_loading")
            assert int(answer.headers["retry-after"]) >= 1
        finally:
            await stub.Drain(pool_pb2.DrainRequest(resume=True), timeout=WAIT_S)
    async with asyncio.timeout(WAIT_S):
        while (await near.chat("Say yes.")).status != 200:
            await asyncio.sleep(0.05)


async def test_a_killed_pool_process_takes_nothing_with_it(near: Node, far: PoolProcess) -> None:
    """Its engines go on, and so do answers from them, running and new ones; it is back by itself."""
    engine = await engine_of(far, near)
    pool = far.find("helixflow.launch.pool")
    async with await near.connect() as wire:
        wire.send(near.endless_request(max_tokens=150))
        await eventually(lambda: engine.busy_slots == 1)
        os.kill(pool.pid, signal.SIGKILL)
        answer = await near.chat("Say yes.")
        assert answer.status == 200
        whole = await wire.read()
        assert whole.body.endswith(b"data: [DONE]\n\n")
    await eventually(lambda: others(far, "helixflow.launch.pool", pool.pid))
    assert (await near.chat("Say yes.")).status == 200
    assert (await engine_of(far, near)).replica.replica_id == engine.replica.replica_id


async def test_a_killed_relay_is_back(near: Node, far: PoolProcess) -> None:
    relay = far.find("helixflow.launch.relay")
    os.kill(relay.pid, signal.SIGKILL)
    assert (await near.chat("Say yes.")).status in (200, 502), "it waits in the backlog of the data port"

    async def answered() -> bool:
        return (await near.chat("Say yes.")).status == 200

    async with asyncio.timeout(WAIT_S):
        while not await answered():
            await asyncio.sleep(0.05)
    assert far.find("helixflow.launch.relay").pid != relay.pid


async def test_a_killed_registry_changes_nothing_for_who_asks(near: Node, far: PoolProcess) -> None:
    control = near.find("helixflow.launch.control")
    registered = len(near.records("pool.registered"))
    os.kill(control.pid, signal.SIGKILL)
    assert (await near.chat("Say yes.")).status == 200
    await eventually(lambda: others(near, "helixflow.launch.control", control.pid))
    await eventually(lambda: len(near.records("pool.registered")) > registered)
    assert near.records("pool.removed") == []
    assert (await near.chat("Say yes.")).status == 200


async def test_the_relay_tells_engines_apart(near: Node, far: PoolProcess) -> None:
    """Strangers and wrong names get nowhere; test_fleet_relay.py has it in detail."""
    relay = far.find("helixflow.launch.relay")
    (port,) = {one.laddr.port for one in relay.net_connections("tcp") if one.status == "LISTEN"}
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(WAIT_S)
        stranger.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        with contextlib.suppress(ConnectionResetError):
            received = stranger.recv(1024)
        assert not received.startswith(b"HTTP")


def test_its_certificate_is_renewed_before_it_ends(near: Node, far: PoolProcess) -> None:
    until(lambda: far.identity.credential.expires_at > time.time() + 20 * 3600)
    until(lambda: far.records("certificate.renewed"))
    assert near.records("certificate.renewed")
    assert not far.records("certificate.not_renewed")


async def test_a_pool_that_ends_is_gone_from_the_gateways_at_once_and_clients_are_told_soon(
    near: Node, far: PoolProcess
) -> None:
    """The last test: the others need it."""
    await asyncio.to_thread(far.close)
    assert far.process.returncode == ExitCode.OK
    await asyncio.to_thread(until, lambda: near.records("pool.removed"))
    async with asyncio.timeout(30):  # `load_wait_s` is longer
        answer = await near.chat()
    assert (answer.status, answer.json["error"]["code"]) == (503, "model_not_served")
    assert "No node serves this model" in answer.json["error"]["message"]
    assert int(answer.headers["retry-after"]) > 0


def test_what_a_pool_lacks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment(tmp_path / "data").items():
        monkeypatch.setenv(name, value)
    # It would bind every logger of this process to a stream that closes with the test.
    for module in ("telemetry.logs", "launch.pool_start"):
        monkeypatch.setattr(f"helixflow.{module}.configure_logging", lambda *_args, **_options: None)
    control = ("--control", "127.0.0.1:1")
    issue = "on the node of the auth service run: helixflow pki issue pool --out pool.pem"
    for words, hint in (((), "--control"), (control, issue)):
        assert main(["pool", *words]) == ExitCode.CONFIG
        said = capsys.readouterr().err
        assert hint in said and said.count("\n") == 1, said
    authority = Settings(data_dir=tmp_path / "authority")
    ensure_pki(authority)
    give_certificate(tmp_path / "data", authority)
    PkiFolder(tmp_path / "data" / "pki").service_file("pool").unlink()
    assert main(["pool", *control]) == ExitCode.CONFIG
    said = capsys.readouterr().err
    assert "pool.pem: there is no such file" in said and "run: helixflow pki issue pool --out pool.pem" in said
    assert "pki init" not in said and said.count("\n") == 1, said


def test_a_pool_that_is_told_nothing_to_serve_fetches_nothing(tmp_path: Path) -> None:
    """It is there at once, and waits for what its fleet's configuration says."""
    authority = Settings(data_dir=tmp_path / "authority")
    ensure_pki(authority)
    give_certificate(tmp_path / "far", authority)
    far = PoolProcess(tmp_path / "far", "127.0.0.1:1")
    try:
        far.wait_serving()
        cache = read_cache(Settings(data_dir=far.data_dir))
        assert cache is not None and cache.models() == ()
        assert not (far.data_dir / "models").exists()
    finally:
        far.close()


def test_a_busy_port_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("telemetry.logs", "launch.pool_start"):
        monkeypatch.setattr(f"helixflow.{module}.configure_logging", lambda *_args, **_options: None)
    authority = Settings(data_dir=tmp_path / "authority")
    ensure_pki(authority)
    for option in ("--port", "--data-port"):
        data_dir = tmp_path / option
        give_certificate(data_dir, authority)
        for name, value in environment(data_dir).items():
            monkeypatch.setenv(name, value)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert main(["pool", "--control", "127.0.0.1:1", option, port]) == ExitCode.PORT_BUSY
        said = capsys.readouterr().err
        assert port in said and said.count("\n") == 1, said
        assert not (data_dir / "models").exists()
