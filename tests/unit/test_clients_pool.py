from pathlib import Path

from helixflow.clients.pool import DeploymentView, PoolWatch, RemotePool, view_of
from helixflow.clients.tokenizers import TokenizerCache
from helixflow.core.capacity import Replica
from helixflow.rpc.generated.pool_v1 import pool_pb2


class NoChannel:
    def unary_unary(self, *_: object, **__: object) -> None: ...

    unary_stream = stream_stream = unary_unary


def _status(state: int = pool_pb2.DEPLOYMENT_STATE_READY) -> pool_pb2.DeploymentStatus:
    replica = pool_pb2.Replica(
        replica_id="r1",
        host="127.0.0.1",
        port=4000,
        api_key="k",
        slots=4,
        context=8192,
        supports_tools=True,
        pid=1,
        vocabulary=49152,
    )
    return pool_pb2.DeploymentStatus(deployment="m/llama_cpp-0", state=state, restarts=2, replicas=[replica])


def test_a_status_becomes_a_view_with_all_its_fields() -> None:
    replica = Replica("r1", "127.0.0.1", 4000, "k", 4, 8192, True, 49152, "")
    assert view_of(_status()) == DeploymentView("m/llama_cpp-0", "ready", "", 2, 0.0, (replica,))


def test_every_state_has_a_short_name_and_a_newer_pools_state_is_no_error() -> None:
    names = [view_of(_status(number)).state for number in (*pool_pb2.DeploymentState.values(), 99)]
    known = ["unspecified", "idle", "pulling", "loading", "ready", "backoff", "failed", "unloading"]
    assert names == [*known, "unspecified"]


def test_only_changes_are_told_and_the_last_views_stay_when_the_pool_goes() -> None:
    told: list[dict[str, DeploymentView]] = []
    watch = PoolWatch(NoChannel(), told.append)  # type: ignore[arg-type]
    snapshot = pool_pb2.WatchReplicasResponse(deployments=[_status()])
    watch._on_snapshot(snapshot, True)
    watch._on_snapshot(snapshot, False)
    watch._on_watch_lost()
    assert [list(views) for views in told] == [["m/llama_cpp-0"]]
    assert watch.views["m/llama_cpp-0"].state == "ready"
    assert not watch.connected


def test_a_replica_elsewhere_is_reached_by_the_data_port_of_its_pool(tmp_path: Path) -> None:
    remote = RemotePool("far", "10.0.0.2", 50062, TokenizerCache(tmp_path))
    status = _status()
    assert view_of(status, remote).replicas == (), "without a name there is no way to it"
    status.replicas[0].server_name = "abc.replica.helixflow.internal"
    status.replicas[0].tokenizer_path = "/on/the/other/node"
    (replica,) = view_of(status, remote).replicas
    assert (replica.host, replica.port, replica.pool) == ("10.0.0.2", 50062, "far")
    assert (replica.server_name, replica.tokenizer_path) == ("abc.replica.helixflow.internal", "")
    (here,) = view_of(status).replicas
    assert (here.host, here.server_name, here.tokenizer_path) == ("127.0.0.1", "", "/on/the/other/node")


def test_a_replica_elsewhere_waits_for_its_tokenizer(tmp_path: Path) -> None:
    remote = RemotePool("far", "10.0.0.2", 50062, TokenizerCache(tmp_path))
    status = _status()
    status.replicas[0].server_name = "abc.replica.helixflow.internal"
    status.replicas[0].tokenizer_sha256 = "ab" * 32
    waiting = view_of(status, remote)
    assert (waiting.state, waiting.replicas) == ("loading", ()), "it cannot be used from here yet"
    assert len(view_of(status).replicas) == 1


def test_a_pool_that_drains_gets_nothing_new() -> None:
    for state in (pool_pb2.DEPLOYMENT_STATE_READY, pool_pb2.DEPLOYMENT_STATE_IDLE):
        told = pool_pb2.DeploymentStatus(deployment="m/x", state=state)  # as pools tell it: without replicas
        for status in (told, _status(state)):
            view = view_of(status, draining=True)
            assert (view.state, view.replicas) == ("draining", ())
