"""`helixflow serve` as a user starts it: a tree of processes with a data directory of its own and the real models."""

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
from prometheus_client.parser import text_string_to_metric_families

from helixflow.core.capacity import Replica
from helixflow.core.keys import generate_key
from helixflow.pki.files import PkiFolder
from helixflow.pki.identity import ServiceIdentity
from helixflow.pool.manifest import StoredModel
from helixflow.rpc.channels import create_blocking_channel
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.settings.tree import Settings
from tests.harness.engine import RunningEngine
from tests.harness.wire import Answer, Wire, request

HELIXFLOW = Path(sys.executable).parent / "helixflow"
# Only a test that fails waits so long: the machine may have other work.
READY_S = 180.0
WAIT_S = 60.0
CHAT_MODEL = "smollm2-135m-instruct"
EMBEDDING_MODEL = "all-minilm-l6-v2"
CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = WAIT_S) -> T:
    """Polls what nothing announces; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


async def eventually(condition: Callable[[], T], seconds: float = WAIT_S) -> T:
    """`until` for tests that talk meanwhile."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)
    return value


def environment(data_dir: Path, **more: str) -> dict[str, str]:
    """Ours without any setting of HelixFlow's but these: a free port, and logs as JSON."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HELIXFLOW_")}
    return {
        **inherited,
        "HELIXFLOW_DATA_DIR": str(data_dir),
        "HELIXFLOW_GATEWAY__HTTP_PORT": "0",
        "HELIXFLOW_GATEWAY__HTTPS_PORT": "0",
        "HELIXFLOW_AUTH__PORT": "0",
        "HELIXFLOW_POOL__PORT": "0",
        "HELIXFLOW_POOL__DATA_PORT": "0",
        "HELIXFLOW_LOG__FORMAT": "json",
        **more,
    }


def write_idle_config(folder: Path) -> Path:
    """A configuration whose one model is somebody else's, and away: no engine starts, and identity is all there is."""
    config = folder / "idle.toml"
    config.write_text(
        '[[models]]\nname = "idle"\n[[models.deployments]]\nengine = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n'
    )
    return config


def fill_store(data_dir: Path, *models: StoredModel) -> None:
    """Gives a data directory the models of the test machine's store, as if they had been pulled before."""
    manifests = data_dir / "models" / "manifests"
    manifests.mkdir(parents=True)
    store = models[0].path.parent.parent
    (data_dir / "models" / "blobs").symlink_to(store / "blobs")
    for model in models:
        (manifests / f"{model.name}.json").write_bytes((store / "manifests" / f"{model.name}.json").read_bytes())


class Node:
    """A running `helixflow serve`. `key` is the bootstrap key; standard output and error go to `out` and `err`."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.data_dir = data_dir
        self.key = generate_key()
        self.out, self.err = (data_dir.with_name(f"{data_dir.name}.{stream}") for stream in ("out", "err"))
        self.environment = environment(data_dir, **{"HELIXFLOW_BOOTSTRAP_API_KEY": self.key, **settings})
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen(
                [HELIXFLOW, "serve"], env=self.environment, stdout=out, stderr=err, start_new_session=True
            )
        self._seen: dict[int, psutil.Process] = {}

    def find_port(self) -> None:
        """Waits for the ports that it listens on."""
        url = self.data_dir / "run" / "gateway.url"
        until(lambda: self.process.poll() is not None or (url.exists() and url.read_text()), READY_S)
        assert self.process.poll() is None, self.err.read_text()
        self.port = int(url.read_text().rpartition(":")[2])
        self.https_port = int(url.with_name("gateway.https_url").read_text().rpartition(":")[2])

    def wait_ready(self, ready_s: float = READY_S) -> "Node":
        self.find_port()
        until(self._is_ready, ready_s)
        self.tree()
        return self

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=READY_S) as answer:
                return bool(answer.status == 200)
        except OSError:  # not yet, or by a gateway that is being replaced
            return False

    async def connect(self) -> Wire:
        return await Wire.connect(self.port)

    @property
    def ca_file(self) -> Path:
        """What clients of the HTTPS port trust."""
        return PkiFolder(self.data_dir / "pki").ca_certificate

    async def connect_tls(self) -> Wire:
        """Over HTTPS, as a client that trusts this node's authority."""
        return await Wire.connect(self.https_port, ssl.create_default_context(cafile=self.ca_file))

    def request(self, path: str, body: Mapping[str, Any], key: str | None = None) -> bytes:
        return request("POST", path, msgspec.json.encode(body), key or self.key)

    def chat_request(self, text: str = "Say hello.", *, key: str | None = None, **fields: Any) -> bytes:
        body = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        return self.request(CHAT, body, key)

    def endless_request(self, text: str = "Count from one to one thousand.", **fields: Any) -> bytes:
        """A chat whose answer goes on for minutes: the end of the text is forbidden."""
        return self.chat_request(text, **{"stream": True, "max_tokens": 6000, "logit_bias": {"2": -100}, **fields})

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        async with await self.connect() as wire:
            content = msgspec.json.encode(body) if body is not None else None
            return await wire.ask(request(method, path, content, self.key))

    async def chat(self, text: str = "Say hello.", *, key: str | None = None, **fields: Any) -> Answer:
        async with await self.connect() as wire:
            return await wire.ask(self.chat_request(text, key=key, **{"max_tokens": 4, **fields}))

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of the series with this name and at least these labels."""
        text = (await self.ask("GET", "/metrics")).body.decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    async def until_metric(self, wanted: float, name: str, **labels: str) -> None:
        """Waits until `metric` is so much."""
        async with asyncio.timeout(WAIT_S):
            while await self.metric(name, **labels) != wanted:
                await asyncio.sleep(0.02)

    async def until_states(self, wanted: Mapping[str, str]) -> None:
        """Waits until the gateway knows the deployments to be in these states."""
        async with asyncio.timeout(WAIT_S):
            while (await self.ask("GET", "/health")).json["deployments"] != wanted:
                await asyncio.sleep(0.02)

    def tree(self) -> list[psutil.Process]:
        """The living processes of this node that were ever seen, the launcher first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in (launcher, *launcher.children(recursive=True)):
                self._seen.setdefault(process.pid, process)
        return [process for process in self._seen.values() if is_alive(process)]

    def find(self, module: str) -> psutil.Process:
        """The one process that runs `module`."""
        (found,) = (process for process in self.tree() if any(module in part for part in command_of(process)))
        return found

    def engine(self, model: str = CHAT_MODEL) -> RunningEngine:
        """The engine behind a model, once there is one, asked directly; its process belongs to the launcher."""
        identity = ServiceIdentity.open(Settings(data_dir=self.data_dir), "gateway")
        with create_blocking_channel(self.data_dir / "run" / "pool.sock", identity, "control") as channel:
            stub = pool_pb2_grpc.PoolServiceStub(channel)

            def replicas() -> list[pool_pb2.Replica]:
                answer = stub.ListModels(pool_pb2.ListModelsRequest(), timeout=WAIT_S, wait_for_ready=True)
                return [r for d in answer.deployments if d.deployment.startswith(f"{model}/") for r in d.replicas]

            (replica,) = until(replicas)
        known = Replica(replica.replica_id, replica.host, replica.port, replica.api_key, replica.slots, replica.context)
        return RunningEngine(known, self.process)

    def records(self, event: str) -> list[dict[str, Any]]:
        """Log records with this event, oldest first."""
        lines = self.err.read_text().splitlines(keepends=True)
        decoded = (msgspec.json.decode(line) for line in lines if line.startswith("{") and line.endswith("\n"))
        return [record for record in decoded if record.get("event") == event]

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """The command line, by the same user with the same environment."""
        return subprocess.run(
            [HELIXFLOW, *words], env=self.environment, capture_output=True, text=True, timeout=READY_S, check=False
        )

    def close(self) -> None:
        """Ends it and whatever it left. Fails when something was left."""
        self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(WAIT_S)
            until(lambda: not self.tree())
        finally:
            for process in self.tree():
                process.kill()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; false for one that ends meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; empty for one that ends meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


@contextlib.contextmanager
def run_node(data_dir: Path, *models: StoredModel, ready_s: float = READY_S, **settings: str) -> Iterator[Node]:
    """Serves until the end of the block; `settings` are environment variables."""
    if models:
        fill_store(data_dir, *models)
    node = Node(data_dir, **settings)
    try:
        yield node.wait_ready(ready_s)
    finally:
        node.close()
