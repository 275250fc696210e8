"""What one gateway makes of several pools, told by hand: nothing is connected."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helixflow.clients.registry import PoolAddress
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.launch.gateway_pools import LOCAL, GatewayPools
from helixflow.routing.balancing import Balancer
from helixflow.rpc.generated.pool_v1 import pool_pb2
from helixflow.settings.deployments import LlamaCppDeployment
from helixflow.settings.tree import Settings
from tests.harness.pki import Pki

NAME = "m/llama_cpp-0"
READY, IDLE, FAILED = (
    pool_pb2.DEPLOYMENT_STATE_READY,
    pool_pb2.DEPLOYMENT_STATE_IDLE,
    pool_pb2.DEPLOYMENT_STATE_FAILED,
)


@pytest.fixture
async def pools(pki: Pki, tmp_path: Path) -> AsyncIterator[GatewayPools]:
    settings = Settings(data_dir=tmp_path)
    balancer = Balancer.of(settings.routing, SystemClock())
    made = GatewayPools(settings, pki.identity("gateway"), None, balancer)
    yield made
    await made.close()


def address(name: str, port: int = 1) -> dict[str, PoolAddress]:
    return {name: PoolAddress(name, f"10.0.0.1:{port}", "[fd00::1]:50062")}


def tell(pools: GatewayPools, pool: str, state: int, *replicas: str, draining: bool = False) -> None:
    shown = [
        pool_pb2.Replica(
            replica_id=name, host="127.0.0.1", port=1, slots=1, context=64, server_name=f"{name}.replica.x"
        )
        for name in replicas
    ]
    status = pool_pb2.DeploymentStatus(deployment=NAME, state=state, replicas=shown)
    snapshot = pool_pb2.WatchReplicasResponse(deployments=[status], pool=pool, draining=draining)
    pools._links[pool].watch._on_snapshot(snapshot, False)


def replicas(pools: GatewayPools) -> list[tuple[str, str, str]]:
    return [(one.pool, one.replica_id, one.host) for one in pools.views[NAME].replicas]


async def test_replicas_of_all_pools_serve_one_deployment(pools: GatewayPools) -> None:
    pools._on_pools({**address("a"), **address("b")}, None)
    tell(pools, LOCAL, READY, "r0")
    tell(pools, "a", READY, "r1")
    tell(pools, "b", FAILED)
    assert pools.views[NAME].state == "ready"
    assert replicas(pools) == [("", "r0", "127.0.0.1"), ("a", "r1", "fd00::1")]


async def test_a_pool_stays_until_it_is_known_to_have_gone(pools: GatewayPools) -> None:
    pools._on_pools({**address("a"), **address("b")}, None)
    tell(pools, "a", READY, "r1")
    tell(pools, "b", READY, "r2")
    pools._on_pools({}, ())
    assert len(replicas(pools)) == 2, "the registry has just started: they may come back"
    pools._on_pools({}, {"b"})
    assert [pool for pool, _, _ in replicas(pools)] == ["a"]
    channel = pools.channel_of("a")
    pools._on_pools(address("a"), None)
    assert pools.channel_of("a") is channel is not None
    pools._on_pools({}, None)
    assert NAME not in pools.views
    assert pools.channel_of("a") is None


async def test_a_pool_that_has_moved_is_followed_to_its_new_address(pools: GatewayPools) -> None:
    pools._on_pools(address("a"), None)
    tell(pools, "a", READY, "r1")
    before = pools.channel_of("a")
    pools._on_pools(address("a", port=2), ())
    assert pools.channel_of("a") is not before
    tell(pools, "a", READY, "r2")
    assert [name for _, name, _ in replicas(pools)] == ["r2"]


async def test_a_load_is_asked_of_the_likeliest_pool_and_then_of_the_next(
    pools: GatewayPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools._on_pools({**address("a"), **address("b"), **address("without")}, None)
    tell(pools, LOCAL, FAILED)
    tell(pools, "a", IDLE)
    tell(pools, "b", IDLE)
    asked: list[str] = []

    def answer(pool: str) -> None:
        async def load(deployment: str) -> None:
            asked.append(pool)
            if pool == "a":
                raise HelixError(ErrorKind.OVERLOADED, "It does not fit.")

        monkeypatch.setattr(pools._links[pool].watch, "load", load)

    for pool in (LOCAL, "a", "b", "without"):
        answer(pool)
    await pools._load(NAME)
    assert asked == ["a", "b"]


async def test_a_drained_pool_is_not_waited_for_while_another_one_can_load(
    pools: GatewayPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its deployments stay as they are, without replicas: seen as ready they kept the others from being asked."""
    pools._on_pools(address("a"), None)
    asked: list[str] = []

    def ask(pool: str) -> None:
        async def load(deployment: str) -> None:
            asked.append(pool)
            tell(pools, pool, READY, "r1")

        monkeypatch.setattr(pools._links[pool].watch, "load", load)

    for pool in (LOCAL, "a"):
        ask(pool)
    tell(pools, LOCAL, READY, draining=True)
    tell(pools, "a", IDLE)
    slots = pools.open_slots(NAME, LlamaCppDeployment(engine="llama_cpp"))
    served = await slots.any_replica(asyncio.get_running_loop().time() + 5)
    assert (served.pool, served.replica_id) == ("a", "r1")
    assert asked == ["a"]


async def test_with_drained_pools_only_the_client_is_told_at_once(pools: GatewayPools) -> None:
    tell(pools, LOCAL, READY, "r0", draining=True)
    slots = pools.open_slots(NAME, LlamaCppDeployment(engine="llama_cpp"))
    with pytest.raises(HelixError, match="being drained") as caught:
        await slots.any_replica(asyncio.get_running_loop().time() + 60)
    assert (caught.value.traits.http, bool(caught.value.retry_after_s)) == (503, True)
    assert pools.problems() == [], "somebody wants it so"
    tell(pools, LOCAL, READY, "r0")
    assert (await slots.any_replica(asyncio.get_running_loop().time() + 5)).replica_id == "r0"


async def test_what_no_pool_has_is_known_once_all_have_been_heard(pools: GatewayPools) -> None:
    slots = pools.open_slots(NAME, LlamaCppDeployment(engine="llama_cpp"))

    async def refusal() -> ErrorKind:
        with pytest.raises(HelixError) as caught:
            await slots.any_replica(asyncio.get_running_loop().time() + 0.01)
        return caught.value.kind

    pools._on_pools(address("a"), None)
    assert await refusal() is ErrorKind.LOADING
    pools._links["a"].watch._on_snapshot(pool_pb2.WatchReplicasResponse(pool="a"), True)
    assert await refusal() is ErrorKind.LOADING, "this node's own pool has said nothing yet"
    pools._links[LOCAL].watch._on_snapshot(pool_pb2.WatchReplicasResponse(), True)
    assert await refusal() is ErrorKind.NOT_SERVED
    tell(pools, "a", READY, "r1")
    assert (await slots.any_replica(asyncio.get_running_loop().time() + 5)).replica_id == "r1"
    pools._on_pools({}, None)
    assert await refusal() is ErrorKind.NOT_SERVED
