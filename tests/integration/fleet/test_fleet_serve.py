"""A pool within `helixflow serve`: it is for its own node, and for others only where an address is meant for them."""

import os
import signal
from pathlib import Path

from helixflow.core.errors import ExitCode
from helixflow.pki.identity import ServiceIdentity
from helixflow.rpc.channels import create_blocking_channel
from helixflow.rpc.generated.pool_v1 import registry_pb2, registry_pb2_grpc
from helixflow.settings.tree import Settings
from tests.harness.node import WAIT_S, Node, command_of, run_node, until, write_idle_config


def registered(node: Node) -> tuple[registry_pb2.Pool, str]:
    """The one pool that the registry knows, and the name of the local one."""
    identity = ServiceIdentity.open(Settings(data_dir=node.data_dir), "gateway")
    with create_blocking_channel(node.data_dir / "run" / "control.sock", identity, "auth") as channel:
        watch = registry_pb2_grpc.RegistryServiceStub(channel).WatchPools(
            registry_pb2.WatchPoolsRequest(), timeout=WAIT_S
        )
        answer = next(watch)
        watch.cancel()
    (pool,) = answer.pools
    return pool, answer.local


def relays(node: Node) -> list[int]:
    return [process.pid for process in node.tree() if "helixflow.launch.relay" in command_of(process)]


def test_on_loopback_there_is_no_way_in_and_elsewhere_one_that_stays(tmp_path: Path) -> None:
    config = {"HELIXFLOW_CONFIG": str(write_idle_config(tmp_path)), "HELIXFLOW_POOL__NAME": "home"}
    with run_node(tmp_path / "a", **config) as node:
        pool, local = registered(node)
        assert (pool.name, pool.address, pool.data_address, local) == ("home", "", "", "home")
        assert relays(node) == []
        assert (node.data_dir / "run" / "pool.address").read_text().startswith("127.0.0.1:")
    open_to_all = {"HELIXFLOW_POOL__HOST": "0.0.0.0", "HELIXFLOW_POOL__ADVERTISED_HOST": "node.example"}
    with run_node(tmp_path / "b", **config, **open_to_all) as node:
        pool, _ = registered(node)
        assert pool.address.startswith("node.example:") and pool.data_address.startswith("node.example:")
        assert pool.address != pool.data_address
        (relay,) = until(lambda: relays(node))
        os.kill(relay, signal.SIGKILL)
        until(lambda: [pid for pid in relays(node) if pid != relay])
    assert node.process.returncode == ExitCode.OK
    assert list((node.data_dir / "run").glob("*.address")) == []
