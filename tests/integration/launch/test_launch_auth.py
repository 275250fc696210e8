"""`helixflow auth` as a user starts it: who reaches it, what keeps it from starting, and how it ends."""

import asyncio
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helixflow.core.errors import ExitCode
from helixflow.core.keys import hash_key
from helixflow.rpc.channels import create_channel
from helixflow.rpc.generated.auth_v1 import admin_pb2, admin_pb2_grpc, identity_pb2, identity_pb2_grpc
from tests.harness.node import HELIXFLOW, environment
from tests.harness.pki import Pki
from tests.integration.launch.conftest import until

WAIT_S = 60.0
# Promised are two seconds (measured: 0.4); all tests share two cores.
STOP_S = 20.0
DEADLINE_S = 60.0


class AuthProcess:
    """One `helixflow auth` with its data directory."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.data_dir = data_dir
        self._environment = environment(data_dir, **settings)
        self._err = data_dir.with_name(f"{data_dir.name}.err")
        with self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [HELIXFLOW, "auth"], env=self._environment, stdout=subprocess.DEVNULL, stderr=err
            )

    def records(self, event: str) -> list[dict[str, Any]]:
        lines = self._err.read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]
        return [record for record in found if record["event"] == event]

    def wait_for(self, event: str) -> dict[str, Any]:
        until(lambda: self.process.poll() is not None or self.records(event), WAIT_S)
        assert self.process.poll() is None, self._err.read_text()
        return self.records(event)[0]

    def wait_serving(self) -> "AuthProcess":
        self.port = int(self.wait_for("auth.serving")["port"])
        return self

    def run(self, *words: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        """Another command with the same settings."""
        return subprocess.run(
            [HELIXFLOW, *words],
            env={**self._environment, **settings},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    @property
    def key(self) -> str:
        return (self.data_dir / "bootstrap.key").read_text().strip()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)


StartAuth = Callable[..., AuthProcess]


@pytest.fixture
def start_auth(tmp_path: Path, mark: str) -> Iterator[StartAuth]:
    started: list[AuthProcess] = []

    def start(**settings: str) -> AuthProcess:
        started.append(AuthProcess(tmp_path / "data", **settings))
        return started[-1]

    yield start
    for process in started:
        process.close()


async def check_health(channel: grpc.aio.Channel) -> int:
    question = health_pb2.HealthCheckRequest(service="helixflow.auth.v1.AdminService")
    return int((await health_pb2_grpc.HealthStub(channel).Check(question, timeout=DEADLINE_S)).status)


async def call_admin(service: AuthProcess, path: str) -> tuple[int, Any]:
    reader, writer = await asyncio.open_unix_connection(service.data_dir / "run" / "admin.sock")
    try:
        head = f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.key}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode())
        async with asyncio.timeout(DEADLINE_S):
            head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    finally:
        writer.close()
    return int(head.split()[1]), json.loads(body)


async def test_it_answers_on_its_port_and_its_sockets(start_auth: StartAuth) -> None:
    service = await asyncio.to_thread(lambda: start_auth().wait_serving())
    assert (service.data_dir / "run" / "auth.address").read_text() == service.target
    pki = Pki(service.data_dir)
    async with create_channel(service.target, pki.identity("monitoring"), "auth") as channel:
        assert await check_health(channel) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            await admin_pb2_grpc.AdminServiceStub(channel).ListKeys(
                admin_pb2.ListInProjectRequest(),
                timeout=DEADLINE_S,
                metadata=(("authorization", f"Bearer {service.key}"),),
            )
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    async with create_channel(service.data_dir / "run" / "control.sock", pki.identity("gateway"), "auth") as channel:
        request = identity_pb2.ResolveKeyRequest(key_hash=hash_key(service.key))
        assert await identity_pb2_grpc.IdentityServiceStub(channel).ResolveKey(request, timeout=DEADLINE_S)
    async with grpc.aio.insecure_channel(service.target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await check_health(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    status, answer = await call_admin(service, "/api/v1/keys")
    assert (status, [key["name"] for key in answer["data"]]) == (200, ["bootstrap"])
    for name in ("admin.sock", "control.sock"):
        assert (service.data_dir / "run" / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_ends_soon_whoever_is_connected(start_auth: StartAuth, number: signal.Signals) -> None:
    service = await asyncio.to_thread(lambda: start_auth().wait_serving())
    pki = Pki(service.data_dir)
    admin = service.data_dir / "run" / "admin.sock"
    idle, halfway = [(await asyncio.open_unix_connection(admin))[1] for _ in range(2)]
    halfway.write(b"POST /api/v1/keys HTTP/1.1\r\nhost: x\r\n")
    await halfway.drain()
    async with create_channel(service.target, pki.identity("gateway"), "auth") as channel:
        watch = identity_pb2_grpc.IdentityServiceStub(channel).WatchChanges(identity_pb2.WatchChangesRequest())
        assert await watch.read()
        assert await asyncio.to_thread(service.stop, number) == ExitCode.OK
        with pytest.raises(grpc.RpcError):
            while await watch.read():
                pass
    for writer in (idle, halfway):
        writer.close()
    assert [path.name for path in (service.data_dir / "run").iterdir()] == ["serve.lock"]
    await asyncio.to_thread(lambda: start_auth().wait_serving())


def test_a_start_that_waits_for_its_database_can_be_ended(start_auth: StartAuth) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"postgresql://nobody@127.0.0.1:{closed.getsockname()[1]}/none"
        service = start_auth(HELIXFLOW_DATABASE__URL=url)
        service.wait_for("database.waiting")
        assert service.stop() == ExitCode.OK


def test_the_data_directory_of_another_process_is_left_alone(start_auth: StartAuth) -> None:
    service = start_auth().wait_serving()
    for words in (("auth",), ("auth", "replace-master-key", "--new-key-file", str(service.data_dir / "next"))):
        done = service.run(*words)
        assert done.returncode == ExitCode.UNAVAILABLE
        assert done.stderr.count("\n") == 1 and f"process {service.process.pid}" in done.stderr, done.stderr
    assert service.stop() == ExitCode.OK


def test_a_busy_port_is_named_before_anything_is_made(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [HELIXFLOW, "auth", "--port", port],
            env=environment(data_dir),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    assert done.returncode == ExitCode.PORT_BUSY
    assert done.stderr.count("\n") == 1 and port in done.stderr, done.stderr
    assert [path.name for path in data_dir.iterdir()] == ["run"]


def test_another_master_key_is_one_line(start_auth: StartAuth) -> None:
    service = start_auth().wait_serving()
    service.stop()
    (service.data_dir / "master.key").write_text("ab" * 32)
    done = service.run("auth")
    assert done.returncode == ExitCode.CONFIG
    assert done.stderr.count("\n") == 1 and "not the master key of this database" in done.stderr
