"""Pools register, and gateways see them come and go."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from helixflow.clients.registry import PoolAddress, Registration, RegistryWatch
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.pool import registration
from helixflow.pool.registration import Registry, RegistryService
from helixflow.rpc.channels import create_channel
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.pool_v1 import registry_pb2, registry_pb2_grpc
from helixflow.rpc.servers import create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from tests.harness.pki import Pki, allow

WAIT_S = 60.0
POOLS = Mapping[str, PoolAddress]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals that a test can wait for, and that a machine with other work can keep."""
    for name, seconds in (("HEARTBEAT_S", 0.1), ("SILENCE_S", 1.5), ("GRACE_S", 1.5), ("SETTLE_S", 1.5)):
        monkeypatch.setattr(registration, name, seconds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    prepare_run_dir(tmp_path / "run")
    return socket_path(tmp_path / "run", "control")


def pool(name: str, node: str = "n1", port: int = 50052) -> registry_pb2.Pool:
    return registry_pb2.Pool(
        name=name, address=f"10.0.0.1:{port}", data_address=f"10.0.0.1:{port + 10}", node_id=node, version="1"
    )


@asynccontextmanager
async def registry_at(pki: Pki, path: Path, registry: Registry) -> AsyncIterator[None]:
    server = create_server(pki.identity("control"), allow(registration.SERVICE_NAME))
    RegistryService(registry).register(server)
    await listen(server, path, pki.identity("control"))
    await server.start()
    registry.open()
    try:
        yield
    finally:
        registry.close()
        await server.stop(0)


class Sets:
    """What a gateway was told last."""

    def __init__(self) -> None:
        self.pools: POOLS = {}
        self.complete = False
        self.left: set[str] = set()
        self.count = 0
        self._changed = asyncio.Event()

    def __call__(self, pools: POOLS, left: Collection[str] | None) -> None:
        self.pools, self.complete, self.left = pools, left is None, set(left or ())
        self.count += 1
        self._changed.set()

    async def until(self, *names: str, complete: bool | None = None) -> None:
        async with asyncio.timeout(WAIT_S):
            while set(self.pools) != set(names) or not self.count or complete not in (None, self.complete):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def running(*runs: Any) -> AsyncIterator[list["asyncio.Task[None]"]]:
    tasks = [asyncio.create_task(run) for run in runs]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def watched(pki: Pki, path: Path) -> AsyncIterator[Sets]:
    sets = Sets()
    async with (
        create_channel(path, pki.identity("gateway"), "auth") as channel,
        running(RegistryWatch(channel, sets).run()),
    ):
        yield sets


async def end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_pool_is_there_until_it_says_goodbye(pki: Pki, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "GRACE_S", 3600)
    async with (
        registry_at(pki, path, Registry()),
        watched(pki, path) as sets,
        create_channel(path, pki.identity("pool"), "auth") as channel,
        running(Registration(channel, pool("a")).run()) as (registering,),
    ):
        await sets.until("a")
        assert sets.pools["a"] == PoolAddress("a", "10.0.0.1:50052", "10.0.0.1:50062")
        await asyncio.sleep(1.5 * registration.SILENCE_S)
        assert set(sets.pools) == {"a"}, "its heartbeats keep it there"
        await end(registering)
        await sets.until()


async def test_a_pool_that_breaks_off_may_come_back_and_is_gone_after_the_grace(pki: Pki, path: Path) -> None:
    async with registry_at(pki, path, Registry()), watched(pki, path) as sets:
        await sets.until(complete=True)
        for _ in range(3):
            channel = create_channel(path, pki.identity("pool"), "auth")
            call = registry_pb2_grpc.RegistryServiceStub(channel).Register(timeout=WAIT_S)
            await call.write(registry_pb2.RegisterRequest(pool=pool("a")))
            answer = await call.read()
            assert (answer.heartbeat_s, answer.silence_s) == (registration.HEARTBEAT_S, registration.SILENCE_S)
            await sets.until("a")
            told = sets.count
            call.cancel()
            await channel.close()
        assert sets.count == told, "nobody noticed"
        await sets.until()


async def test_one_that_is_silent_is_gone(pki: Pki, path: Path) -> None:
    async with (
        registry_at(pki, path, Registry()),
        watched(pki, path) as sets,
        create_channel(path, pki.identity("pool"), "auth") as channel,
    ):
        call = registry_pb2_grpc.RegistryServiceStub(channel).Register(timeout=WAIT_S)
        await call.write(registry_pb2.RegisterRequest(pool=pool("a")))
        assert await call.read()
        await sets.until("a")
        await sets.until()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert "silent" in from_rpc_error(caught.value).message


async def test_gateways_keep_the_set_while_the_registry_is_away_and_pools_come_back(pki: Pki, path: Path) -> None:
    async with (
        watched(pki, path) as sets,
        create_channel(path, pki.identity("pool"), "auth") as channel,
        running(Registration(channel, pool("a")).run()),
    ):
        async with registry_at(pki, path, Registry()):
            await sets.until("a", complete=True)
        assert set(sets.pools) == {"a"}
        async with registry_at(pki, path, Registry()):
            await sets.until("a", complete=False)
            await sets.until("a", complete=True)


async def test_an_empty_set_counts_once_it_is_complete(pki: Pki, path: Path) -> None:
    async with watched(pki, path) as sets, registry_at(pki, path, Registry()):
        await sets.until(complete=False)
        await sets.until(complete=True)


async def test_a_goodbye_counts_before_the_set_is_complete(
    pki: Pki, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "SETTLE_S", 3600)
    async with (
        registry_at(pki, path, Registry()),
        watched(pki, path) as sets,
        create_channel(path, pki.identity("pool"), "auth") as channel,
    ):
        for _ in range(2):
            registration_of_a = Registration(channel, pool("a"))
            async with running(registration_of_a.run()) as (registering,):
                await registration_of_a.registered.wait()
                await sets.until("a")
                assert not sets.left
                await end(registering)
                await sets.until()
            assert (sets.complete, sets.left) == (False, {"a"})


async def test_a_name_belongs_to_the_node_that_has_it(pki: Pki, path: Path) -> None:
    async with (
        registry_at(pki, path, Registry(pool("home", "n0"))),
        watched(pki, path) as sets,
        create_channel(path, pki.identity("pool"), "auth") as channel,
        running(Registration(channel, pool("a", "n1")).run()),
    ):
        await sets.until("a")
        for name in ("a", "home"):
            call = registry_pb2_grpc.RegistryServiceStub(channel).Register(timeout=WAIT_S)
            await call.write(registry_pb2.RegisterRequest(pool=pool(name, "n2")))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert from_rpc_error(caught.value).kind is ErrorKind.CONFLICT
        async with (
            running(Registration(channel, pool("a", "n1", 6000)).run()),
            asyncio.timeout(WAIT_S),
        ):
            while sets.pools["a"].address != "10.0.0.1:6000":
                await asyncio.sleep(0.005)


async def test_the_pool_of_the_registrys_own_node_is_not_told_as_another_one(pki: Pki, path: Path) -> None:
    registry = Registry()
    async with registry_at(pki, path, registry), watched(pki, path) as sets:
        registry.set_local(pool("home", "n0"))
        registry.join(pool("a"))
        await sets.until("a")
        assert [one.name for one in registry.pools] == ["home", "a"]


async def test_a_pool_without_addresses_is_for_its_own_node(pki: Pki, path: Path) -> None:
    registry = Registry()
    async with registry_at(pki, path, registry), watched(pki, path) as sets:
        registry.join(registry_pb2.Pool(name="hidden", node_id="n1"))
        registry.join(pool("a"))
        await sets.until("a")


@pytest.mark.parametrize(
    "wrong",
    [
        pool(""),
        pool("A B"),
        pool("x" * 64),
        registry_pb2.Pool(name="a", address="nowhere"),
        registry_pb2.Pool(name="a", data_address="h:1\r\nx"),
        registry_pb2.Pool(name="a", node_id="n" * 65),
        registry_pb2.Pool(name="a", version="a\nb"),
    ],
)
def test_what_is_no_pool_is_refused(wrong: registry_pb2.Pool) -> None:
    registry = Registry()
    with pytest.raises(HelixError) as caught:
        registry.join(wrong)
    assert caught.value.kind is ErrorKind.INVALID_VALUE
    assert registry.pools == []


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "MAX_POOLS", 2)
    registry = Registry()
    for name in ("a", "b"):
        registry.join(pool(name))
    with pytest.raises(HelixError) as caught:
        registry.join(pool("c"))
    assert caught.value.kind is ErrorKind.OVERLOADED
    registry.join(pool("a"))
